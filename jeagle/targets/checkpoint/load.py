"""Loads a target's weights onto the mesh; each process reads only the slices of its own devices.

The host holds one tensor at a time, or one device's part of the experts where each expert is a tensor. Stacked layers
are put together on the devices.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jeagle.targets.checkpoint.layout import NARROW, ParameterLayout, check_room, layouts, narrowed, scale_path
from jeagle.targets.checkpoint.tensor_reader import ParameterReader
from jeagle.targets.families import family_of, read_spec
from jeagle.targets.families.common import Family
from jeagle.targets.model.decoder import Decoder
from jeagle.targets.model.spec import TargetSpec
from jeagle.targets.quantised.views import Index, WeightSource

Read = Callable[[Index], np.ndarray]

SMALL_STACK = 2**26  # bytes; the host puts smaller stacks together, which needs no compiled program


class Target(NamedTuple):
    """A frozen target: its specification, and its decoder split into a static part and a state of arrays."""

    spec: TargetSpec
    graphdef: Any
    state: Any

    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.state)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of its arrays; None for arrays on a single device."""
        return getattr(jax.tree.leaves(self.state)[0].sharding, "mesh", None)


def abstract_target(
    spec: TargetSpec, dtype: Any, *, stacked: bool | None = None, stored: str = "", mesh: Mesh | None = None
) -> Target:
    """A Target of shapes instead of arrays, for compiling ahead of time and for loading.

    Args:
      dtype: of matrix products.
      stacked: whether layers of one shape are stacked; None = on all backends but the CPU's.
      stored: one of `NARROW` or "", as for `load_target`.
    """
    stacked = jax.default_backend() != "cpu" if stacked is None else stacked
    kind, narrow = jnp.dtype(dtype), jnp.dtype(NARROW[stored]) if stored else None
    model = nnx.eval_shape(lambda: Decoder(spec, kind, nnx.Rngs(0), stacked=stacked, stored=narrow, mesh=mesh))
    return Target(spec, *nnx.split(model))


def load_target(
    source: WeightSource,
    mesh: Mesh,
    dtype: Any,
    *,
    stacked: bool | None = None,
    stored: str = "",
    family: Family | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Target:
    """Loads a target onto `mesh`, with kernels in `dtype` and norms in float32.

    Everything is checked before any weight is read.

    Args:
      stacked: whether layers of one shape are stacked; None = on all backends but the CPU's.
      stored: one of `NARROW`, the type that the layers' kernels are stored in, with a scale for each output (half the
        bytes of bfloat16); "" = `dtype`.
      family: replaces the family of the architecture's name.
      progress: called with the bytes loaded and the bytes in total.

    Raises:
      UserError: for an unsupported architecture or switch, a tensor that is missing or has another shape, more layers
        than config.json says, or weights that the devices have no room for.
    """
    spec = read_spec(source.config, family)
    abstract = abstract_target(spec, dtype, stacked=stacked, stored=stored, mesh=mesh)
    reader = ParameterReader(source, (family or family_of(source.config)).names)
    parameters = layouts(abstract.model(), abstract.state, mesh, jnp.dtype(dtype), stored)
    for layout in parameters.values():
        for layer in layout.layers:
            reader.check(layout, layer)
    if warning := reader.check_all_read(spec.layers):
        print(warning, file=sys.stderr, flush=True)
    check_room(parameters.values(), mesh)
    total, done = sum(layout.size for layout in parameters.values()), 0
    arrays: dict[Any, jax.Array] = {}
    for path, layout in parameters.items():

        def report(layers: int, done: int = done, each: int = layout.size // len(layout.layers)) -> None:
            progress(done + layers * each, total)

        both = _load(reader, layout, report)
        arrays |= zip((path, scale_path(path)), both, strict=False)
        done += layout.size
    leaves = dict(nnx.to_flat_state(abstract.state))
    state = nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves.items()])
    return Target(spec, abstract.graphdef, state)


def _load(reader: ParameterReader, layout: ParameterLayout, report: Callable[[int], None]) -> tuple[jax.Array, ...]:
    """Loads a parameter, and its scale where it is narrow; large layers are put one by one into their stack."""
    if not layout.stacked or layout.size <= SMALL_STACK:
        parts = _read(reader, layout, layout.layers, layout.stacked)
        report(len(layout.layers))
        return parts
    stacks: tuple[jax.Array, ...] = ()
    for i, layer in enumerate(layout.layers):
        parts = _read(reader, layout, (layer,), False)
        report(i + 1)
        stacks = stacks or tuple(empty_stack(len(layout.layers), part) for part in parts)
        stacks = tuple(put_in_stack(stack, i, part) for stack, part in zip(stacks, parts, strict=True))
    return stacks


def _read(
    reader: ParameterReader, layout: ParameterLayout, layers: tuple[int | None, ...], stacked: bool
) -> tuple[jax.Array, ...]:
    shape, sharding = layout.shape, layout.sharding
    if stacked:
        shape, sharding = (len(layers), *shape), stack_sharding(sharding)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return reader.read(layout, layers[0], index)
        return np.stack([reader.read(layout, layer, index[1:]) for layer in layers])

    # Where each expert is a tensor, the host holds one device's part at a time.
    wide = from_slices(shape, layout.dtype, sharding, read, at_once=not reader.piece(layout.key, layers[0]).by_expert)
    return (wide,) if layout.narrow is None else narrowed(wide, layout.narrow, sharding)


def from_slices(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding, read: Read, *, at_once: bool) -> jax.Array:
    """Makes a sharded array from slices; each process reads only those of its own devices.

    Args:
      read: an index, with a start and a stop in every slice -> that part, in any type and memory order.
      at_once: adjacent slices are read as one, which from a disk is many times faster than by columns; otherwise the
        host holds no more than the part of one device.
    """
    parts: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        edges = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        parts.setdefault(edges, []).append(device)

    def size_of(edges: tuple[tuple[int, int], ...]) -> int:
        return math.prod(stop - start for start, stop in edges)

    box = tuple((min(e[0] for e in axis), max(e[1] for e in axis)) for axis in zip(*parts, strict=True))
    all_parts = read(_slices(box)) if at_once and size_of(box) <= sum(map(size_of, parts)) else None
    arrays = []
    for edges, devices in parts.items():
        if all_parts is None:
            part = read(_slices(edges))
        else:
            part = all_parts[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(edges, box, strict=True))]
        own = np.ascontiguousarray(part, dtype)
        arrays += [jax.device_put(own, device) for device in devices]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, arrays))


def _slices(edges: tuple[tuple[int, int], ...]) -> Index:
    return tuple(slice(*edge) for edge in edges)


def empty_stack(layers: int, like: jax.Array) -> jax.Array:
    """A stack of `layers` arrays like this one, filled with zeros."""
    return jnp.zeros((layers, *like.shape), like.dtype, device=stack_sharding(like.sharding))


def put_in_stack(stack: jax.Array, layer: int, part: jax.Array) -> jax.Array:
    """Replaces entry `layer` of the stack by `part`, in the same memory."""
    return _put_in_stack(stack, layer, part, stack_sharding(part.sharding))


def stack_sharding(sharding: NamedSharding) -> NamedSharding:
    """The sharding of a stack of arrays that have this sharding."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


@functools.partial(jax.jit, static_argnames=("sharding",), donate_argnames=("stack",))
def _put_in_stack(stack: jax.Array, layer: Any, part: jax.Array, sharding: NamedSharding) -> jax.Array:
    # Not stack.at[layer].set: a scatter into bfloat16 makes XLA's CPU backend rewrite all of the stack in float32.
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0), sharding)
