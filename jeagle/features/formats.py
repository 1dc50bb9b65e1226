"""How hidden states are kept: as they are, or in a byte each with scales; and back into Features on the device.

What teaches is `last`, or the likeliest tokens of each of the target's distributions, which are smaller still.

A narrow array is kept as  round(x / (row * channel)):  one float32 `channel` for each of the H places of a vector,
the median of |x| over a first batch, once for the whole store; one float32 `row` for each vector, which fits what is
left to the type's range. The channel's scale is what makes int8 enough: a few places of a residual stream are
hundreds of times as large as the others.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jeagle.interfaces import Features, TopK

Kind = Literal["float32", "bfloat16", "int8", "fp8"]
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
LARGEST = {"int8": 127.0, "fp8": 448.0}  # of the narrow kinds
LOG_PROBS = np.dtype(np.float16)  # of a truncated teacher: half a thousandth of a probability, less than int8 costs
TOP = ("top_ids", "top_log_probs", "top_rest")  # what a TopK's arrays are called on disk
_LEAST = 1e-12


class Scaled(NamedTuple):
    """Vectors [B, T, ..., H]; the scales are None for what is kept as it is.

    Attributes:
      values: in one of DTYPES. row: float32 [B, T, ...]. channel: float32 [B, ..., H].
    """

    values: Any
    row: Any = None
    channel: Any = None


class Stored(NamedTuple):
    """Features as a store keeps them: what its readers hand to the training step, which decodes them on the device.

    Attributes:
      taps: Scaled [B, T, A, H].
      teacher: `last` as Scaled [B, T, H]; or the likeliest tokens, their log-probabilities in float16.
      greedy_BT, lse_BT: int32 and float32; like the teacher, 0 where nothing is kept.
    """

    aux: Scaled
    teacher: Scaled | TopK
    greedy_BT: Any
    lse_BT: Any


class Form(NamedTuple):
    """What a store keeps of features, and as what.

    Attributes:
      taps, last: a Kind each; that of `last` counts only where top_k is 0.
      top_k: so many of the likeliest tokens of each distribution are kept instead of `last`.
      taps_at: all positions, or those that some slot can see (`align.seen_positions`).
    """

    aux: str = "float32"
    last: str = "float32"
    top_k: int = 0
    aux_at: str = "all"

    def described(self) -> dict[str, Any]:
        """What store.json says of it."""
        teacher = {"teacher": "top_k", "top_k": self.top_k} if self.top_k else {"teacher": "last", "last": self.last}
        return {"taps": self.aux, "taps_at": self.aux_at} | teacher

    @classmethod
    def of(cls, described: dict[str, Any]) -> Form:
        """From what store.json says; stores from before there was a choice say less."""
        return cls(**{name: described[name] for name in cls._fields if name in described})


def decode(stored: Stored) -> Features:
    """The Features of a batch, in float32. Runs inside jit."""
    teacher = stored.teacher
    if isinstance(teacher, TopK):
        whole: Any = teacher._replace(log_probs_BTP=teacher.log_probs_BTP.astype(jnp.float32))
    else:
        whole = _decoded(teacher)
    return Features(_decoded(stored.aux), whole, stored.greedy_BT, stored.lse_BT)


def _decoded(scaled: Scaled) -> jax.Array:
    values = scaled.values.astype(jnp.float32)
    if scaled.row is None:
        return values
    return values * scaled.row[..., None] * scaled.channel[:, None]


def encode(features: Features, form: Form, channels: dict[str, jax.Array]) -> Stored:
    """What a store keeps of a batch's features, whose teacher is the form's. Runs inside jit.

    Args:
      channels: float32 scales, "taps" [A, H] and "last" [H], read for narrow kinds only.
    """
    aux, teacher = _encoded(features.aux_BTAH, form.aux, channels["taps"]), features.teacher
    if isinstance(teacher, TopK):
        kept: Any = teacher._replace(log_probs_BTP=teacher.log_probs_BTP.astype(LOG_PROBS))
    else:
        kept = _encoded(teacher, form.last, channels["last"])
    return Stored(aux, kept, features.greedy_BT, features.lse_BT)


def _encoded(x: jax.Array, kind: str, channel: jax.Array) -> Scaled:
    dtype = DTYPES[kind]
    if kind not in LARGEST:
        return Scaled(x.astype(dtype))
    even = x.astype(jnp.float32) / channel
    row = jnp.maximum(jnp.abs(even).max(axis=-1), _LEAST) / LARGEST[kind]
    scaled = even / row[..., None]
    values = jnp.round(scaled).astype(dtype) if kind == "int8" else scaled.astype(dtype)
    return Scaled(values, row.astype(jnp.float32), jnp.broadcast_to(channel, (x.shape[0], *channel.shape)))


def channel_scales(vectors: np.ndarray, kind: str) -> np.ndarray:
    """The median of |x| over vectors [N, ..., H]: float32 [..., H], never 0; ones for fp8, whose exponents do this.

    A mean, or a maximum, would belong to the one token of a document that gathers attention.
    """
    if kind == "fp8":
        return np.ones(vectors.shape[1:], np.float32)
    sizes = np.median(np.abs(np.asarray(vectors, np.float32)), axis=0)
    floor = max(float(np.median(sizes)) * 1e-3, _LEAST)
    return np.maximum(sizes, floor).astype(np.float32)


def bytes_per_token(hidden: int, aux: int, form: Form, kept: float = 1.0, seen: float = 1.0) -> float:
    """Bytes that a token costs in a store, its tokens and masks included.

    Args:
      kept: share of tokens whose teacher is kept. seen: share of tokens whose taps are.
    """
    teacher = form.top_k * (4 + LOG_PROBS.itemsize) + 4 if form.top_k else _bytes(hidden, form.last)
    return seen * aux * _bytes(hidden, form.aux) + kept * (teacher + 8) + 13


def _bytes(hidden: int, kind: str) -> int:
    """Of a vector and its scale."""
    return DTYPES[kind].itemsize * hidden + 4 * (kind in LARGEST)


def by_name(stored: Stored) -> dict[str, Any]:
    """The arrays [B, T, ...] of a store's rows, by the names that they have on disk."""
    found = {"taps": stored.aux.values, "taps_row": stored.aux.row}
    if isinstance(stored.teacher, TopK):
        found |= dict(zip(TOP, stored.teacher, strict=True))
    else:
        found |= {"last": stored.teacher.values, "last_row": stored.teacher.row}
    found |= {"greedy": stored.greedy_BT, "lse": stored.lse_BT}
    return {name: array for name, array in found.items() if array is not None}
