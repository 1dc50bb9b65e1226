"""Sharded arrays from slices that are read one after another, so that the host never holds more than one of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


def from_slices(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding, read: Read, *, at_once: bool) -> jax.Array:
    """The array of `shape` whose slices `read` returns, each process asking only for what its own devices hold.

    Args:
      read: an index (start and stop spelled out) -> that part, in any type and memory order.
      at_once: slices that lie together are read as one, which on a disk is many times faster than by columns; else the
        host holds no more than the part of one device.
    """
    parts: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        edges = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        parts.setdefault(edges, []).append(device)
    box = tuple((min(e[0] for e in axis), max(e[1] for e in axis)) for axis in zip(*parts, strict=True))
    whole = read(_slices(box)) if at_once and _size(box) <= sum(map(_size, parts)) else None
    arrays = []
    for edges, devices in parts.items():
        if whole is None:
            found = read(_slices(edges))
        else:
            found = whole[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(edges, box, strict=True))]
        own = np.ascontiguousarray(found, dtype)
        arrays += [jax.device_put(own, device) for device in devices]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, arrays))


def _slices(edges: tuple[tuple[int, int], ...]) -> Index:
    return tuple(slice(*edge) for edge in edges)


def _size(edges: tuple[tuple[int, int], ...]) -> int:
    return math.prod(stop - start for start, stop in edges)


def empty_stack(layers: int, like: jax.Array) -> jax.Array:
    """Room for `layers` arrays like this one."""
    return _empty_stack((layers, *like.shape), like.dtype, of_stack(like.sharding))


def put_in_stack(stack: jax.Array, layer: int, part: jax.Array) -> jax.Array:
    """`stack` with `part` as its entry `layer`, in the same memory."""
    return _put_in_stack(stack, layer, part, of_stack(part.sharding))


def of_stack(sharding: NamedSharding) -> NamedSharding:
    """How a stack of arrays that lie so lies."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _empty_stack(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnames=("sharding",), donate_argnames=("stack",))
def _put_in_stack(stack: jax.Array, layer: int, part: jax.Array, sharding: NamedSharding) -> jax.Array:
    # Not stack.at[layer].set: a scatter into bfloat16 makes XLA's CPU backend rewrite all of the stack in float32.
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0), sharding)
