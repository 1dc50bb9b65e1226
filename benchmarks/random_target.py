"""A target with random weights, made where they lie: no file is read, and the host holds none of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jeagle.config import TargetConfig
from jeagle.targets import Target, TargetSpec, abstract_target
from jeagle.targets.checkpoint.layout import ParameterLayout, check_room, layouts, narrowed, scale_path
from jeagle.targets.checkpoint.load import empty_stack, put_in_stack

DEVIATION = 0.02  # of matrices, as transformers starts them; vectors, which are norms, are ones


def random_target(spec: TargetSpec, mesh: Mesh, config: TargetConfig) -> Target:
    """What loading such a target would give, layout and types alike, but for the numbers.

    Raises:
      UserError: where the devices have no room for it.
    """
    dtype, stored = jnp.dtype(config.dtype), "" if config.weights == "dtype" else config.weights
    abstract = abstract_target(spec, dtype, stored=stored, mesh=mesh)
    found = layouts(abstract.model(), abstract.state, mesh, dtype, stored)
    check_room(found.values(), mesh)
    arrays: dict[Any, jax.Array] = {}
    for number, (path, layout) in enumerate(found.items()):
        both = _arrays(layout, jax.random.fold_in(jax.random.key(0), number))
        arrays |= zip((path, scale_path(path)), both, strict=False)
    leaves = nnx.to_flat_state(abstract.state)
    return abstract._replace(state=nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves]))


def _arrays(layout: ParameterLayout, key: jax.Array) -> tuple[jax.Array, ...]:
    """A parameter, and its scale where it is narrow; layers one by one into their stack."""
    stacks: tuple[jax.Array, ...] = ()
    for place in range(len(layout.layers)):
        wide = _layer(jax.random.fold_in(key, place), layout.shape, layout.dtype, layout.sharding)
        parts = (wide,) if layout.narrow is None else narrowed(wide, layout.narrow, layout.sharding)
        if not layout.stacked:
            return parts
        stacks = stacks or tuple(empty_stack(len(layout.layers), part) for part in parts)
        stacks = tuple(put_in_stack(stack, place, part) for stack, part in zip(stacks, parts, strict=True))
    return stacks


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _layer(key: jax.Array, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    array = jax.random.normal(key, shape) * DEVIATION if len(shape) > 1 else jnp.ones(shape)
    return jax.lax.with_sharding_constraint(array.astype(dtype), sharding)
