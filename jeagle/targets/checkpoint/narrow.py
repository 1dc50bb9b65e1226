"""Weights kept in half the bytes: a narrow number for each, and one scale for each output."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

NARROW: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def narrowed(kernel: jax.Array, kind: Any, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """kernel [..., I, O] -> (narrow [..., I, O], scale [..., O] float32) with kernel = narrow * scale, nearly.

    The scale makes the largest number of each output the largest that `kind` has.
    """
    return _narrow(kernel, kind, (sharding, scale_sharding(sharding, kernel.ndim)))


def scale_sharding(sharding: NamedSharding, rank: int) -> NamedSharding:
    """How the scale [..., O] of a kernel [..., I, O] with `rank` axes lies."""
    axes = tuple(sharding.spec) + (None,) * (rank - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes[:-2], axes[-1]))


@functools.partial(jax.jit, static_argnames=("kind", "shardings"), donate_argnames=("kernel",))
def _narrow(kernel: jax.Array, kind: Any, shardings: tuple[NamedSharding, NamedSharding]):
    numbers = kernel.astype(jnp.float32)
    integer = jnp.issubdtype(kind, jnp.integer)
    largest = float(jnp.iinfo(kind).max if integer else jnp.finfo(kind).max)
    scale = jnp.maximum(jnp.abs(numbers).max(axis=-2), 1e-30) / largest
    scaled = numbers / scale[..., None, :]
    narrow = (jnp.round(scaled) if integer else scaled).astype(kind)
    return (
        jax.lax.with_sharding_constraint(narrow, shardings[0]),
        jax.lax.with_sharding_constraint(scale, shardings[1]),
    )
