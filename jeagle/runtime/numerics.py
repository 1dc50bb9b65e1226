"""Array functions whose plain form some backend of XLA is slow at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def first_largest(logits: jax.Array, block: int = 64) -> jax.Array:
    """argmax over the last axis, ties to the first, as jnp.argmax; on a CPU largest of blocks, then within the block.

    XLA's CPU backend vectorises a maximum, but not an argmax: over 49,152 entries this is 20 times as fast. A TPU would
    have to lay the blocks out anew, which takes longer than the argmax.
    """
    size = logits.shape[-1]
    if size % block:
        return jnp.argmax(logits, axis=-1)

    def by_blocks(logits: jax.Array) -> jax.Array:
        blocks = logits.reshape(*logits.shape[:-1], size // block, block)
        which = jnp.argmax(blocks.max(axis=-1), axis=-1)
        chosen = jnp.take_along_axis(blocks, which[..., None, None], axis=-2)[..., 0, :]
        return which * block + jnp.argmax(chosen, axis=-1)

    return jax.lax.platform_dependent(logits, cpu=by_blocks, default=lambda logits: jnp.argmax(logits, axis=-1))


def as_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers, for what is sliced, gathered or scattered; others as they are.

    XLA's CPU backend has no such operations on 16-bit floats: it first converts the whole array to float32.
    """
    return x if jnp.finfo(x.dtype).bits != 16 else jax.lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `as_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def largest(logits: jax.Array, count: int, block: int = 64) -> tuple[jax.Array, jax.Array]:
    """The `count` largest entries over the last axis and their places, falling, ties to the first, as jax.lax.top_k.

    Found in the `count` blocks with the largest maxima, for each of these holds one that is as large as any entry of
    another block: a small part of the vocabulary is sorted instead of all of it.
    """
    size = logits.shape[-1]
    if size % block or count * block >= size:
        return jax.lax.top_k(logits, count)
    blocks = logits.reshape(*logits.shape[:-1], size // block, block)
    which = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), count)[1], axis=-1)  # in order, so that ties stay in theirs
    chosen = jnp.take_along_axis(blocks, which[..., None], axis=-2).reshape(*logits.shape[:-1], count * block)
    values, places = jax.lax.top_k(chosen, count)
    return values, jnp.take_along_axis(which, places // block, axis=-1) * block + places % block


def add_in_place(whole: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    """The whole with `part` added from `start` on along an axis: in a loop, where the whole lies."""
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis)


def rows_product(x: jax.Array, matrix: jax.Array, *, rows: bool = False) -> jax.Array:
    """x [..., I] times matrix [I, O] (or, with `rows`, matrix [O, I] by its rows) -> [..., O], summed in float32.

    Leading axes are merged first: XLA's CPU backend multiplies two matrices as they lie, either way round, but for
    more axes it first copies the matrix transposed.
    """
    flat = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        matrix,
        (((1,), (1 if rows else 0,)), ((), ())),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return flat.reshape(*x.shape[:-1], -1)


def summed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum over the leading axes of a [..., I] times b [..., O] -> [I, O], summed in float32: a weight's gradient.

    Give the narrower operand first: XLA's CPU backend copies that one transposed. It needs two leading axes or more:
    with one, it multiplies bfloat16 matrices in float32, at a third of the speed.
    """
    lead = tuple(range(a.ndim - 1))
    product = jax.lax.dot_general(
        a, b, ((lead, lead), ((), ())), preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)
    )
    # A caller's transposition must not be folded into the product: XLA's CPU backend has no bfloat16 product of that
    # form, and says so only when it runs.
    return jax.lax.optimization_barrier(product)
