"""Grouped-query attention over explicit masks, in blocks of queries."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without any key yields numbers and not NaN


def attend(
    queries_BTQC: jax.Array,
    keys_BSGC: jax.Array,
    values_BSGC: jax.Array,
    allowed_BTS: jax.Array,
    dtype: Any,
    block: int = 512,
) -> jax.Array:
    """softmax(q k / sqrt(C)) v where allowed -> float32 [B, T, Q, C].

    Query head i reads key head i // (Q / G). At most `block` queries' scores exist at a time. A query with no allowed
    key gets the mean of all values: such rows are padding and must not be used.
    """
    length = queries_BTQC.shape[1]
    if length <= block or length % block:
        return _attend_block(queries_BTQC, keys_BSGC, values_BSGC, allowed_BTS, dtype)

    def one(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend_block(parts[0], keys_BSGC, values_BSGC, parts[1], dtype)

    blocks = length // block
    queries = jnp.moveaxis(queries_BTQC.reshape(-1, blocks, block, *queries_BTQC.shape[2:]), 1, 0)
    allowed = jnp.moveaxis(allowed_BTS.reshape(-1, blocks, block, allowed_BTS.shape[-1]), 1, 0)
    out = jax.lax.map(jax.checkpoint(one), (queries, allowed))
    return jnp.moveaxis(out, 0, 1).reshape(queries_BTQC.shape)


def _attend_block(queries: jax.Array, keys: jax.Array, values: jax.Array, allowed: jax.Array, dtype: Any) -> jax.Array:
    batch, length, heads, width = queries.shape
    groups = keys.shape[2]
    grouped = queries.reshape(batch, length, groups, heads // groups, width).astype(dtype)
    total = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.einsum("btgrc,bsgc->bgrts", grouped, keys.astype(dtype), preferred_element_type=total)
    scores = jnp.where(allowed[:, None, None], scores / math.sqrt(width), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    mixed = jnp.einsum("bgrts,bsgc->btgrc", weights, values.astype(dtype), preferred_element_type=total)
    return mixed.reshape(batch, length, heads, width)
