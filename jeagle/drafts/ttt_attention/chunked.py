"""The same in blocks of slots, grouped heads unrepeated, products in a chosen type: memory linear in T."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30


def chunked(
    queries_BNQC: jax.Array,
    keys_BTGC: jax.Array,
    values_BTGC: jax.Array,
    allowed_BNT: jax.Array,
    own_keys_JBNGC: jax.Array,
    own_values_JBNGC: jax.Array,
    own_allowed_J: jax.Array,
    *,
    dtype: Any,
    block: int = 512,
) -> jax.Array:
    """As `reference.reference`; at most `block` slots' scores exist at a time, forward and backward."""
    slots = queries_BNQC.shape[1]
    if slots <= block or slots % block:
        return _block(
            queries_BNQC, keys_BTGC, values_BTGC, allowed_BNT, own_keys_JBNGC, own_values_JBNGC, own_allowed_J, dtype
        )

    def split(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], slots // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def one(parts):
        queries, allowed, own_keys, own_values = parts
        return _block(queries, keys_BTGC, values_BTGC, allowed, own_keys, own_values, own_allowed_J, dtype)

    parts = (split(queries_BNQC, 1), split(allowed_BNT, 1), split(own_keys_JBNGC, 2), split(own_values_JBNGC, 2))
    out = jax.lax.map(jax.checkpoint(one), parts)
    return jnp.moveaxis(out, 0, 1).reshape(queries_BNQC.shape)


def _block(queries, keys, values, allowed, own_keys, own_values, own_allowed, dtype):
    batch, slots, heads, width = queries.shape
    groups = keys.shape[2]
    total = jnp.promote_types(dtype, jnp.float32)
    grouped = queries.reshape(batch, slots, groups, heads // groups, width)
    past = jnp.einsum("bngrc,btgc->bgrnt", grouped.astype(dtype), keys.astype(dtype), preferred_element_type=total)
    # One key a slot: elementwise work, not a matrix product.
    own = jnp.einsum("bngrc,jbngc->bgrnj", grouped.astype(total), own_keys.astype(total))
    scale = 1 / math.sqrt(width)
    past = jnp.where(allowed[:, None, None], past * scale, MASKED)
    own = jnp.where(own_allowed, own * scale, MASKED)
    top = jax.lax.stop_gradient(jnp.maximum(past.max(axis=-1), own.max(axis=-1, initial=MASKED)))[..., None]
    past, own = jnp.exp(past - top), jnp.exp(own - top)
    sums = past.sum(axis=-1) + own.sum(axis=-1)
    mixed = jnp.einsum("bgrnt,btgc->bngrc", past.astype(dtype), values.astype(dtype), preferred_element_type=total)
    mixed = mixed + jnp.einsum("bgrnj,jbngc->bngrc", own, own_values.astype(total))
    mixed = mixed / jnp.moveaxis(sums, 3, 1)[..., None]
    return mixed.reshape(batch, slots, heads, width)
