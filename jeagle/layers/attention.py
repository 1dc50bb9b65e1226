"""Grouped-query attention under masks that follow from positions, computed in blocks of queries."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LANES = 128  # widths of slices are multiples of it, which TPUs and GPUs read fastest

_MASKED = -1e30  # finite, so that a row without any key yields numbers and not NaN
_RUNS = 8  # of blocks of queries that read the same keys: more would save little, and each is compiled


class AttentionMask(NamedTuple):
    """Positions of queries and keys, from which it follows which keys each query may attend to.

    Attributes:
      queries_BT, keys_BS: positions within the document, int32.
      query_segments_BT, key_segments_BS: the documents of packed rows, whose queries and keys are the same tokens in
        the same order, with positions that rise by one within each document; None where keys come from a cache.
      also_BTS: a further condition on a query and a key; None where there is none.
    """

    queries_BT: jax.Array
    keys_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    also_BTS: jax.Array | None = None

    def visible(self, window: int = 0, chunk: int = 0) -> Bool[Array, "B T S"]:
        """Whether query t may attend to key s: the key is of the same document and not later.

        Args:
          window: the key must also be fewer than `window` positions back; 0 = no limit.
          chunk: the key must also lie in the same chunk of `chunk` positions; 0 = no chunks.
        """
        queries, keys = self.queries_BT[:, :, None], self.keys_BS[:, None, :]
        allowed = keys <= queries
        if self.query_segments_BT is not None and self.key_segments_BS is not None:
            allowed &= self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :]
        if self.also_BTS is not None:
            allowed &= self.also_BTS
        if window:
            allowed &= queries - keys < window
        if chunk:
            allowed &= queries // chunk == keys // chunk
        return allowed


class _Side(NamedTuple):
    """Queries or keys [B, T, heads, C], with their positions and documents [B, T], and the queries' condition."""

    heads: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    also: jax.Array | None = None


def masked_attention(
    queries_BTQC: Float[Array, "B T Q C"],
    keys_BSGC: Float[Array, "B S G C"],
    values_BSGE: Float[Array, "B S G E"],
    mask: AttentionMask,
    dtype: Any,
    *,
    window: int = 0,
    chunk: int = 0,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    sinks_Q: Float[Array, " Q"] | None = None,
    block: int = 512,
) -> Float[Array, "B T Q E"]:
    """softmax(scale q k) v over the visible keys, in float32.

    Query head i reads key head i // (Q / G). At most `block` queries' scores exist at a time, and blocks of packed rows
    skip most keys that none of their queries can see. A query without any visible key gets a mean of values; such rows
    are padding and must not be used.

    Args:
      dtype: type of the operands of matrix products.
      window, chunk: as in `AttentionMask.visible`.
      scale: factor of the scores; 0 = 1 / sqrt(C).
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 = no cap.
      sinks_Q: a score for each head that takes part in the softmax and has no value.
    """
    length = queries_BTQC.shape[1]
    scale = scale or 1 / math.sqrt(queries_BTQC.shape[-1])

    def attend(queries: _Side, keys: _Side, values: jax.Array) -> jax.Array:
        return _attend_block(queries, keys, values, dtype, window, chunk, scale, soft_cap, sinks_Q)

    def attend_blocks(queries: _Side, keys: _Side, values: jax.Array) -> jax.Array:
        if queries.positions.shape[1] == block:
            return attend(queries, keys, values)
        return _join_blocks(jax.lax.map(lambda part: attend(part, keys, values), _split_blocks(queries, block)))

    queries = _Side(queries_BTQC, mask.queries_BT, mask.query_segments_BT, mask.also_BTS)
    keys = _Side(keys_BSGC, mask.keys_BS, mask.key_segments_BS)
    if length <= block or length % block:
        return attend(queries, keys, values_BSGE)
    if mask.query_segments_BT is None:
        return attend_blocks(queries, keys, values_BSGE)
    back = min((size for size in (window, chunk) if size), default=length)
    width = -(-(block + back - 1) // LANES) * LANES  # number of keys that a block's queries can see
    if width < length:

        def attend_near(part: tuple[_Side, jax.Array]) -> jax.Array:
            """One block of queries over the `width` keys that end with it."""
            first = jnp.maximum((part[1] + 1) * block - width, 0)
            near = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, width, axis=1), (keys, values_BSGE))
            return attend(part[0], *near)

        return _join_blocks(jax.lax.map(attend_near, (_split_blocks(queries, block), jnp.arange(length // block))))
    # Queries of a run of blocks read the keys up to the end of the run.
    blocks = length // block
    ends = sorted({-(-blocks * (i + 1) // _RUNS) * block for i in range(_RUNS)})
    runs = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        run = jax.tree.map(lambda x, start=start, end=end: x[:, start:end], queries)
        runs.append(attend_blocks(run, *jax.tree.map(lambda x, end=end: x[:, :end], (keys, values_BSGE))))
    return jnp.concatenate(runs, axis=1)


def _split_blocks(side: _Side, block: int) -> _Side:
    """[B, T, ...] -> [T / block, B, block, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0), side)


def _join_blocks(out: jax.Array) -> jax.Array:
    """[T / block, B, block, ...] -> [B, T, ...]."""
    moved = jnp.moveaxis(out, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _attend_block(queries: _Side, keys: _Side, values: jax.Array, dtype, window, chunk, scale, soft_cap, sinks):
    """`masked_attention` without blocks: all scores exist at the same time."""
    mask = AttentionMask(queries.positions, keys.positions, queries.segments, keys.segments, queries.also)
    allowed = mask.visible(window, chunk)
    batch, length, heads, width = queries.heads.shape
    groups = keys.heads.shape[2]
    grouped = queries.heads.reshape(batch, length, groups, heads // groups, width).astype(dtype)
    total = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", grouped, keys.heads.astype(dtype), preferred_element_type=total) * scale
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(allowed[:, None, None], scores, _MASKED)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(scores.dtype).reshape(groups, heads // groups, 1, 1)
        top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
        weights = jnp.exp(scores - top)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
    mixed = jnp.einsum("bgrts,bsge->btgre", weights.astype(dtype), values.astype(dtype), preferred_element_type=total)
    return mixed.reshape(batch, length, heads, values.shape[-1])
