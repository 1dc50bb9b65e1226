"""Grouped-query attention over masks that follow from positions, in blocks of queries."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.layers.mask import Sight

MASKED = -1e30  # finite, so that a row without any key yields numbers and not NaN
SPANS = 8  # of blocks of queries that read the same keys: more would save little, and each is compiled


def attend(
    queries_BTQC: jax.Array,
    keys_BSGC: jax.Array,
    values_BSGE: jax.Array,
    sight: Sight,
    dtype: Any,
    *,
    window: int = 0,
    chunk: int = 0,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    sinks_Q: jax.Array | None = None,
    block: int = 512,
) -> jax.Array:
    """softmax(scale q k) v over the visible keys -> float32 [B, T, Q, E].

    Query head i reads key head i // (Q / G). At most `block` queries' scores exist at a time, and packed rows' queries
    meet hardly any key that they cannot see. A query with no visible key gets a mean of values: such rows are padding
    and must not be used.

    Args:
      window, chunk: as in `Sight.visible`.
      scale: of the scores; 0 = 1 / sqrt(C).
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 = they stay.
      sinks_Q: a score for each head that joins the softmax and has no value.
    """
    length = queries_BTQC.shape[1]
    scale = scale or 1 / math.sqrt(queries_BTQC.shape[-1])

    def one(queries: _Side, keys: _Side, values_BSGE: jax.Array) -> jax.Array:
        allowed = Sight(queries.positions, keys.positions, queries.segments, keys.segments).visible(window, chunk)
        return _attend_block(queries.heads, keys.heads, values_BSGE, allowed, dtype, scale, soft_cap, sinks_Q)

    queries = _Side(queries_BTQC, sight.queries_BT, sight.query_segments_BT)
    keys = _Side(keys_BSGC, sight.keys_BS, sight.key_segments_BS)
    if length <= block or length % block:
        return one(queries, keys, values_BSGE)
    packed = sight.query_segments_BT is not None
    back = min((size for size in (window, chunk) if size), default=length)
    width = -(-(block + back - 1) // _LANES) * _LANES  # of the keys that a block's queries can see
    parts = (one, queries, keys, values_BSGE, block)
    if packed and width < length:
        return _near(*parts, width)
    return jnp.concatenate([_span(*parts, packed, *span) for span in _spans(length // block, packed)], axis=1)


_LANES = 128  # widths of slices are multiples of it, which TPUs and GPUs read fastest


class _Side(NamedTuple):
    """Queries or keys [B, T, heads, C], with their positions and documents [B, T]."""

    heads: jax.Array
    positions: jax.Array
    segments: jax.Array | None


def _near(one: Any, queries: _Side, keys: _Side, values: jax.Array, block: int, width: int) -> jax.Array:
    """Each block of queries over the `width` keys that end with it."""
    places = jnp.arange(queries.positions.shape[1] // block)

    def step(part: tuple[_Side, jax.Array]) -> jax.Array:
        first = jnp.maximum((part[1] + 1) * block - width, 0)
        near = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, width, axis=1), (keys, values))
        return one(part[0], *near)

    return _joined(jax.lax.map(jax.checkpoint(step), (_split(queries, block), places)))


def _spans(blocks: int, packed: bool) -> list[tuple[int, int]]:
    """Runs of blocks of queries, [first, end) each; packed ones see no keys behind their end."""
    ends = sorted({-(-blocks * (i + 1) // SPANS) for i in range(SPANS)}) if packed else [blocks]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _span(
    one: Any, queries: _Side, keys: _Side, values: jax.Array, block: int, packed: bool, first: int, end: int
) -> jax.Array:
    """The blocks first .. end - 1 over all keys, or, packed, over those up to their end."""
    mine = jax.tree.map(lambda x: x[:, first * block : end * block], queries)
    if packed:
        keys, values = jax.tree.map(lambda x: x[:, : end * block], (keys, values))
    if end == first + 1:
        return jax.checkpoint(one)(mine, keys, values)
    return _joined(jax.lax.map(jax.checkpoint(lambda part: one(part, keys, values)), _split(mine, block)))


def _split(side: _Side, block: int) -> _Side:
    """[B, T, ...] -> [T / block, B, block, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0), side)


def _joined(out: jax.Array) -> jax.Array:
    """[T / block, B, block, ...] -> [B, T, ...]."""
    moved = jnp.moveaxis(out, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _attend_block(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    allowed: jax.Array,
    dtype: Any,
    scale: float,
    soft_cap: float,
    sinks: jax.Array | None,
) -> jax.Array:
    batch, length, heads, width = queries.shape
    groups = keys.shape[2]
    grouped = queries.reshape(batch, length, groups, heads // groups, width).astype(dtype)
    total = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", grouped, keys.astype(dtype), preferred_element_type=total) * scale
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    weights = _softmax(scores, sinks).astype(dtype)
    mixed = jnp.einsum("bgrts,bsge->btgre", weights, values.astype(dtype), preferred_element_type=total)
    return mixed.reshape(batch, length, heads, values.shape[-1])


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(scores.dtype).reshape(scores.shape[1], scores.shape[2], 1, 1)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
