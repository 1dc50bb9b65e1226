"""What a TTT step keeps for its backward pass; everything else is made anew there."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jeagle.runtime.numerics import as_bits, from_bits

# What is kept, by how dear it is to make anew: a product, the residual stream (all of a layer's), attention.
PRODUCT, STATE, ATTENTION = "product", "state", "attention"


def kept(x: jax.Array, dtype: Any, name: str = PRODUCT) -> jax.Array:
    """x in the type of the products, marked to be kept."""
    return _kept(x.astype(dtype), name)


def marked(x: jax.Array, name: str) -> jax.Array:
    """x, marked to be kept, where no gradient is taken through it; as bits, since steps are stacked and sliced."""
    return from_bits(checkpoint_name(as_bits(x), name), x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _kept(x: jax.Array, name: str) -> jax.Array:
    return marked(x, name)


@_kept.defjvp
def _kept_jvp(name: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return marked(primals[0], name), tangents[0]
