"""How a store represents hidden states, and how they become `Features` again on the device.

Hidden states are stored in a float type, or in one byte each (int8, fp8) with two scales:

    x  is about  values * row * channel

`channel` is a float32 number for each of the H coordinates of a vector, the same in the whole store: the median of |x|
over a first batch. `row` is a float32 number for each vector, which fits the rest to the range of the type. int8 needs
the channel's scale, because a few coordinates of a residual stream are hundreds of times as large as the others.

In place of the last hidden states a store may contain the likeliest tokens of each of the target's distributions, which
are smaller still. A segment contains no padding, and the teacher only of those positions that may teach a slot
(`align.near_supervised`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jeagle import align
from jeagle.interfaces import Batch, Features, TopK

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
LARGEST = {"int8": 127.0, "fp8": 448.0}  # the largest value of each type of one byte
LOG_PROBS = np.dtype(np.float16)  # loses half a thousandth of a probability, less than int8 loses of a hidden state
TOP_K_ARRAYS = ("top_ids", "top_log_probs", "top_rest")  # the names on disk of a TopK's arrays
TOKEN_ARRAYS = ("tokens", "segments", "positions", "supervised")  # the arrays of a Batch, one entry a token
TEACHER_ARRAYS = ("last", "last_row", *TOP_K_ARRAYS, "greedy", "lse")  # one entry for each position with a teacher
_SMALLEST_SCALE = 1e-12


class ScaledVectors(NamedTuple):
    """Vectors [B, T, ..., H] in one of DTYPES, with the scales of a type of one byte.

    Attributes:
      values: the vectors, [B, T, H] or [B, T, A, H].
      row: float32, a scale for each vector; None for a float type.
      channel: float32, a scale for each coordinate, repeated for each row of the batch; None for a float type.
    """

    values: Shaped[Array, "B T *axes H"]
    row: Float[Array, "B T *axes"] | None = None
    channel: Float[Array, "B *axes H"] | None = None


class StoredFeatures(NamedTuple):
    """Features of a batch as a store represents them. The training step decodes them on the device.

    Attributes:
      aux: the aux hidden states, [B, T, A, H].
      teacher: the last hidden states, [B, T, H], or the likeliest tokens with float16 log-probabilities.
      greedy_BT, lse_BT: int32 and float32. They are 0, as is the teacher, at positions whose teacher is not stored.
    """

    aux: ScaledVectors
    teacher: ScaledVectors | TopK
    greedy_BT: Int[Array, "B T"]
    lse_BT: Float[Array, "B T"]


class StoreFormat(NamedTuple):
    """What a store contains of features, and in which types.

    Attributes:
      aux, last: a name of DTYPES each, for aux and for last hidden states; `last` matters only where top_k is 0.
      top_k: how many of the likeliest tokens of each distribution are stored in place of the last hidden states; 0
        stores the hidden states.
    """

    aux: str = "float32"
    last: str = "float32"
    top_k: int = 0

    def to_json(self) -> dict[str, Any]:
        """The entry in store.json, whose names have not changed since the first version."""
        teacher = {"teacher": "top_k", "top_k": self.top_k} if self.top_k else {"teacher": "last", "last": self.last}
        return {"taps": self.aux, "taps_at": "all"} | teacher

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> StoreFormat:
        """The format that an entry in store.json describes; those of early versions lack fields."""
        return cls(tree["taps"], tree.get("last", "float32"), tree.get("top_k", 0))


def decode_features(stored: StoredFeatures) -> Features:
    """The Features of a batch, in float32. It runs inside jit."""
    teacher: Any = stored.teacher
    if isinstance(teacher, TopK):
        teacher = teacher._replace(log_probs_BTP=teacher.log_probs_BTP.astype(jnp.float32))
    else:
        teacher = _unscale(teacher)
    return Features(_unscale(stored.aux), teacher, stored.greedy_BT, stored.lse_BT)


def _unscale(scaled: ScaledVectors) -> Any:
    values = scaled.values.astype(jnp.float32)
    if scaled.row is None or scaled.channel is None:
        return values
    return values * scaled.row[..., None] * scaled.channel[:, None]


def encode_features(features: Features, form: StoreFormat, channels: dict[str, Any]) -> StoredFeatures:
    """The representation of a batch's features in a store. It runs inside jit.

    Args:
      features: their teacher is a TopK exactly where `form.top_k` is not 0.
      channels: float32 scales, "taps" [A, H] and "last" [H]; only types of one byte read them.
    """
    teacher: Any = features.teacher
    if isinstance(teacher, TopK):
        teacher = teacher._replace(log_probs_BTP=teacher.log_probs_BTP.astype(LOG_PROBS))
    else:
        teacher = _scale(teacher, form.last, channels["last"])
    aux = _scale(features.aux_BTAH, form.aux, channels["taps"])
    return StoredFeatures(aux, teacher, features.greedy_BT, features.lse_BT)


def _scale(x: Any, kind: str, channel: Any) -> ScaledVectors:
    dtype = DTYPES[kind]
    if kind not in LARGEST:
        return ScaledVectors(x.astype(dtype))
    even = x.astype(jnp.float32) / channel
    row = jnp.maximum(jnp.abs(even).max(axis=-1), _SMALLEST_SCALE) / LARGEST[kind]
    scaled = even / row[..., None]
    values = jnp.round(scaled).astype(dtype) if kind == "int8" else scaled.astype(dtype)
    return ScaledVectors(values, row.astype(jnp.float32), jnp.broadcast_to(channel, (x.shape[0], *channel.shape)))


def channel_scales(vectors: Float[np.ndarray, "N *axes H"], kind: str) -> Float[np.ndarray, "*axes H"]:
    """The scale of each coordinate: the median of |x| over vectors, float32 and never 0.

    A mean or a maximum would follow the one token of a document that gathers attention. fp8 gets ones, because the
    exponents of its values already do what the scales do.
    """
    if kind == "fp8":
        return np.ones(vectors.shape[1:], np.float32)
    sizes = np.median(np.abs(np.asarray(vectors, np.float32)), axis=0)
    floor = max(float(np.median(sizes)) * 1e-3, _SMALLEST_SCALE)
    return np.maximum(sizes, floor).astype(np.float32)


def bytes_per_token(hidden: int, aux_layers: int, form: StoreFormat, teachers: float = 1.0) -> float:
    """Bytes that a token costs in a store, its token id, positions and loss mask included.

    Args:
      hidden: H. aux_layers: A.
      teachers: the share of tokens whose teacher is stored, 0 to 1.
    """
    aux, last = (DTYPES[kind].itemsize * hidden + 4 * (kind in LARGEST) for kind in (form.aux, form.last))
    teacher = form.top_k * (4 + LOG_PROBS.itemsize) + 4 if form.top_k else last
    return aux_layers * aux + teachers * (teacher + 8) + 13


def arrays_by_name(stored: StoredFeatures) -> dict[str, Any]:
    """The arrays [B, T, ...] of stored features by their names on disk, without the scales of channels."""
    arrays = {"taps": stored.aux.values, "taps_row": stored.aux.row}
    if isinstance(stored.teacher, TopK):
        arrays |= dict(zip(TOP_K_ARRAYS, stored.teacher, strict=True))
    else:
        arrays |= {"last": stored.teacher.values, "last_row": stored.teacher.row}
    arrays |= {"greedy": stored.greedy_BT, "lse": stored.lse_BT}
    return {name: array for name, array in arrays.items() if array is not None}


def empty_stored(rows: int, length: int, described: dict[str, Any]) -> StoredFeatures:
    """Zeros for `rows` rows of `length` positions, still without the scales of channels.

    Args:
      described: a segment's description of its arrays, by their names on disk.
    """

    def empty(name: str) -> np.ndarray:
        return np.zeros((rows, length, *described[name]["shape"][1:]), described[name]["dtype"])

    def scaled(name: str) -> ScaledVectors:
        return ScaledVectors(empty(name), empty(f"{name}_row") if f"{name}_row" in described else None)

    teacher = scaled("last") if "last" in described else TopK(*map(empty, TOP_K_ARRAYS))
    return StoredFeatures(scaled("taps"), teacher, empty("greedy"), empty("lse"))


class RaggedRows(NamedTuple):
    """Rows one after the other, each without its padding.

    Attributes:
      lengths: tokens of each row, and as many aux hidden states.
      teachers: positions of each row whose teacher is stored.
      arrays: by name: those of TOKEN_ARRAYS, "taps" and "taps_row" with an entry a token, those of TEACHER_ARRAYS with
        an entry for each teacher; no scales where hidden states are stored in a float type.
    """

    lengths: list[int]
    teachers: list[int]
    arrays: dict[str, np.ndarray]


def ragged_rows(batch: Batch, stored: StoredFeatures, rows: Iterable[int] | None = None) -> RaggedRows:
    """The chosen rows of a batch and their features, without what a store leaves out.

    Args:
      batch, stored: host arrays of some rows.
      rows: which of these rows; None takes all.

    Raises:
      ValueError: where padding precedes a token.
    """
    lengths_B, near_BT = (batch.segments_BT > 0).sum(axis=1), align.near_supervised(batch, xp=np)
    chosen = range(len(batch.tokens_BT)) if rows is None else list(rows)
    if not all(batch.segments_BT[b, : lengths_B[b]].all() for b in chosen):
        raise ValueError("padding stands before a token")
    arrays = {
        name: np.concatenate(
            [np.asarray(x[b])[near_BT[b] if name in TEACHER_ARRAYS else slice(lengths_B[b])] for b in chosen]
        )
        for name, x in (dict(zip(TOKEN_ARRAYS, batch, strict=True)) | arrays_by_name(stored)).items()
        if len(chosen)
    }
    return RaggedRows([int(lengths_B[b]) for b in chosen], [int(near_BT[b].sum()) for b in chosen], arrays)


def joined_rows(parts: list[RaggedRows]) -> RaggedRows:
    """The rows of several parts one after the other."""
    arrays = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    lengths, teachers = (list(itertools.chain(*counts)) for counts in zip(*(p[:2] for p in parts), strict=True))
    return RaggedRows(lengths, teachers, arrays)
