"""A target's weights, each process reading only the slices that its own devices hold.

The host holds one tensor at a time (of experts that are tensors of their own, one device's part of them): stacked
layers are put together on the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jeagle.targets.checkpoint.layout import Layout, check_room, layouts, scale_path
from jeagle.targets.checkpoint.narrow import NARROW, narrowed
from jeagle.targets.checkpoint.shards import empty_stack, from_slices, of_stack, put_in_stack
from jeagle.targets.checkpoint.tensor_reader import Reader
from jeagle.targets.checkpoint.weights import WeightSource
from jeagle.targets.families import Family, family_of, read_spec
from jeagle.targets.model.decoder import Decoder
from jeagle.targets.model.spec import TargetSpec

Progress = Callable[[int, int], None]

SMALL_STACK = 2**26  # bytes of all layers: up to here the host puts them together, which needs no program


class Target(NamedTuple):
    """A frozen target: its shape, and its decoder split into a static and an array part."""

    spec: TargetSpec
    graphdef: Any
    state: Any

    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.state)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that its arrays lie on; None for arrays of a single device."""
        return getattr(jax.tree.leaves(self.state)[0].sharding, "mesh", None)


def abstract_target(
    spec: TargetSpec, dtype: Any, *, stacked: bool | None = None, stored: str = "", mesh: Mesh | None = None
) -> Target:
    """A Target of shapes without arrays: for ahead-of-time compilation and for loading into."""
    stacked = jax.default_backend() != "cpu" if stacked is None else stacked
    kind, narrow = jnp.dtype(dtype), jnp.dtype(NARROW[stored]) if stored else None
    model = nnx.eval_shape(lambda: Decoder(spec, kind, nnx.Rngs(0), stacked=stacked, stored=narrow, mesh=mesh))
    return Target(spec, *nnx.split(model))


def random_target(spec: TargetSpec, dtype: Any, seed: int = 0, *, stacked: bool = False) -> Target:
    """A target with random float32 weights, for tests and benchmarks."""
    return Target(spec, *nnx.split(Decoder(spec, jnp.dtype(dtype), nnx.Rngs(seed), stacked=stacked)))


def load_target(
    source: WeightSource,
    mesh: Mesh,
    dtype: Any,
    *,
    stacked: bool | None = None,
    stored: str = "",
    family: Family | None = None,
    progress: Progress = lambda done, total: None,
) -> Target:
    """The target of `source`, laid out on `mesh`, kernels in `dtype`, norms in float32.

    Everything is checked before anything is read.

    Args:
      stored: keep the layers' kernels in memory as one of `NARROW` (half the bytes of bfloat16), scaled by column.
      family: a description that replaces the one found by the architecture's name.
      progress: called with bytes loaded and bytes in all.

    Raises:
      UserError: for an unsupported architecture or switch, a tensor that is missing or of another shape, or weights
        that the devices have no room for.
    """
    spec = read_spec(source.config, family)
    abstract = abstract_target(spec, dtype, stacked=stacked, stored=stored, mesh=mesh)
    reader = Reader(source, (family or family_of(source.config)).names)
    found = layouts(abstract.model(), abstract.state, mesh, jnp.dtype(dtype), stored)
    for layout in found.values():
        for layer in layout.layers:
            reader.check(layout, layer)
    check_room(found.values(), mesh)
    total, done = sum(layout.size for layout in found.values()), 0
    arrays: dict[Any, jax.Array] = {}
    for path, layout in found.items():

        def report(layers: int, done: int = done, each: int = layout.size // len(layout.layers)) -> None:
            progress(done + layers * each, total)

        both = _load(reader, layout, report)
        arrays |= zip((path, scale_path(path)), both, strict=False)
        done += layout.size
    leaves = dict(nnx.to_flat_state(abstract.state))
    state = nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves.items()])
    return Target(spec, abstract.graphdef, state)


def _load(reader: Reader, layout: Layout, report: Callable[[int], None]) -> tuple[jax.Array, ...]:
    """A parameter, and its scale where it is narrow; large layers one by one into their stack."""
    if not layout.stacked or layout.size <= SMALL_STACK:
        parts = _read(reader, layout, layout.layers, layout.stacked)
        report(len(layout.layers))
        return parts
    stacks: tuple[jax.Array, ...] = ()
    for place, layer in enumerate(layout.layers):
        parts = _read(reader, layout, (layer,), False)
        report(place + 1)
        stacks = stacks or tuple(empty_stack(len(layout.layers), part) for part in parts)
        stacks = tuple(put_in_stack(stack, place, part) for stack, part in zip(stacks, parts, strict=True))
    return stacks


def _read(reader: Reader, layout: Layout, layers: tuple[int | None, ...], stacked: bool) -> tuple[jax.Array, ...]:
    shape, sharding = layout.shape, layout.sharding
    if stacked:
        shape, sharding = (len(layers), *shape), of_stack(sharding)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return reader.read(layout, layers[0], index)
        return np.stack([reader.read(layout, layer, index[1:]) for layer in layers])

    # Of experts that are tensors of their own the host holds one device's part at a time.
    wide = from_slices(shape, layout.dtype, sharding, read, at_once=not reader.of_many(layout))
    return (wide,) if layout.narrow is None else narrowed(wide, layout.narrow, sharding)
