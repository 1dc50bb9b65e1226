"""Grouped-query attention over masks that follow from positions, in blocks of queries."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without any key yields numbers and not NaN


class Sight(NamedTuple):
    """Where queries and keys stand: what a query may see follows from it.

    Attributes:
      queries_BT, keys_BS: positions within the document.
      query_segments_BT, key_segments_BS: the documents of packed rows; None where a row is one document.
    """

    queries_BT: jax.Array
    keys_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None

    def visible(self, window: int = 0, chunk: int = 0) -> jax.Array:
        """bool [B, T, S]: same document, not later, fewer than `window` positions back, in the same `chunk`."""
        queries, keys = self.queries_BT[:, :, None], self.keys_BS[:, None, :]
        allowed = keys <= queries
        if self.query_segments_BT is not None and self.key_segments_BS is not None:
            allowed &= self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :]
        if window:
            allowed &= queries - keys < window
        if chunk:
            allowed &= queries // chunk == keys // chunk
        return allowed


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

    Query head i reads key head i // (Q / G). At most `block` queries' scores exist at a time. A query with no visible
    key gets the mean of all values: such rows are padding and must not be used.

    Args:
      window, chunk: as in `Sight.visible`.
      scale: of the scores; 0 = 1 / sqrt(C).
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 = they stay.
      sinks_Q: a score for each head that joins the softmax and has no value.
    """
    length = queries_BTQC.shape[1]
    scale = scale or 1 / math.sqrt(queries_BTQC.shape[-1])

    def one(parts: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        queries, positions, segments = parts
        allowed = sight._replace(queries_BT=positions, query_segments_BT=segments).visible(window, chunk)
        return _attend_block(queries, keys_BSGC, values_BSGE, allowed, dtype, scale, soft_cap, sinks_Q)

    parts = (queries_BTQC, sight.queries_BT, sight.query_segments_BT)
    if length <= block or length % block:
        return one(parts)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], length // block, block, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(one), jax.tree.map(split, parts))
    return jnp.moveaxis(out, 0, 1).reshape(*queries_BTQC.shape[:-1], values_BSGE.shape[-1])


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
