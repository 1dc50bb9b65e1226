"""How hidden states are kept: as they are, or in a byte each with scales; and back into Features on the device.

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

from jeagle.joints import Features

Kind = Literal["float32", "bfloat16", "int8", "fp8"]
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
LARGEST = {"int8": 127.0, "fp8": 448.0}  # of the narrow kinds
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
      taps: Scaled [B, T, A, H]. last: Scaled [B, T, H].
      greedy_BT, lse_BT: int32 and float32; like `last`, 0 where nothing is kept.
    """

    taps: Scaled
    last: Scaled
    greedy_BT: Any
    lse_BT: Any


def decode(stored: Stored) -> Features:
    """The Features of a batch, in float32. Runs inside jit."""
    return Features(_decoded(stored.taps), _decoded(stored.last), stored.greedy_BT, stored.lse_BT)


def _decoded(scaled: Scaled) -> jax.Array:
    values = scaled.values.astype(jnp.float32)
    if scaled.row is None:
        return values
    return values * scaled.row[..., None] * scaled.channel[:, None]


def encode(features: Features, taps_kind: str, last_kind: str, channels: dict[str, jax.Array]) -> Stored:
    """What a store keeps of a batch's features. Runs inside jit.

    Args:
      channels: float32 scales, "taps" [A, H] and "last" [H], read for narrow kinds only.
    """
    return Stored(
        _encoded(features.taps_BTAH, taps_kind, channels["taps"]),
        _encoded(features.last_BTH, last_kind, channels["last"]),
        features.greedy_BT,
        features.lse_BT,
    )


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


def bytes_per_token(hidden: int, taps: int, taps_kind: str, last_kind: str, kept: float = 1.0) -> float:
    """Bytes that a token costs in a store, its tokens and masks included.

    Args:
      kept: share of tokens whose `last` is kept.
    """
    each = {name: DTYPES[kind].itemsize * hidden + 4 * (kind in LARGEST) for name, kind in _kinds(taps_kind, last_kind)}
    return taps * each["taps"] + kept * (each["last"] + 8) + 13


def _kinds(taps_kind: str, last_kind: str) -> tuple[tuple[str, str], ...]:
    return (("taps", taps_kind), ("last", last_kind))
