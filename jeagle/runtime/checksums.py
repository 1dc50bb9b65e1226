"""A checksum of an array's values, which does not depend on how the array is stored, sharded or cut into blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksum(values: Any, shape: Sequence[int] | None = None, corner: Sequence[int] | None = None) -> jax.Array:
    """The sum of a hash of each value's bits and place, uint32 modulo 2**32.

    A change of one value always changes it, and other changes do so all but one time in 2**32. The sums of the blocks
    of an array add up to the sum of the whole array.

    Args:
      values: numbers of at most 32 bits, or bools.
      shape: of the whole array; None where `values` are all of it.
      corner: where `values` begin in the whole array.

    Source: the hash is lowbias32 of Wellons (nullprogram.com/blog/2018/07/31, public domain).
    """
    strides = np.cumprod([1, *reversed(shape or np.shape(values))], dtype=np.uint64)[-2::-1]
    start = np.zeros(np.ndim(values), np.uint64) if corner is None else np.asarray(corner, np.uint64)
    return _summed(values, strides.astype(np.uint32), np.uint32((start * strides).sum() % 2**32))


def described(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The shape, type and checksum of each array as one text, such as `[8, 4] float32 05e41a7c`."""
    sums = jax.device_get({name: checksum(array) for name, array in arrays.items()})
    return {name: describe(array.dtype, array.shape, sums[name]) for name, array in arrays.items()}


def describe(dtype: Any, shape: Sequence[int], total: Any) -> str:
    """The text of `described` for one array."""
    return f"{list(shape)} {dtype} {int(total):08x}"


@jax.jit
def _summed(values: jax.Array, strides: jax.Array, start: jax.Array) -> jax.Array:
    values = values.astype(jnp.uint8) if values.dtype == bool else values
    place = start
    for axis in range(values.ndim):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis) * strides[axis]
    mixed = values.view(f"uint{8 * values.dtype.itemsize}").astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
