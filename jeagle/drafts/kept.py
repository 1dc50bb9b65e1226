"""What a TTT step keeps for its backward pass; everything else is made anew there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT, ATTENTION = "product", "attention"  # what is kept, by how dear it is to make anew; attention the dearest


def kept(x: jax.Array, dtype: Any) -> jax.Array:
    """x in the type of the products, marked to be kept: it took a product to make."""
    return _kept(x.astype(dtype), PRODUCT)


def marked(x: jax.Array, name: str) -> jax.Array:
    """x, marked to be kept, where no gradient is taken through it.

    16-bit numbers are kept as integers: XLA's CPU backend slices no bfloat16, and would first convert what all steps
    kept to float32.
    """
    if jnp.finfo(x.dtype).bits != 16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _kept(x: jax.Array, name: str) -> jax.Array:
    return marked(x, name)


@_kept.defjvp
def _kept_jvp(name: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return marked(primals[0], name), tangents[0]
