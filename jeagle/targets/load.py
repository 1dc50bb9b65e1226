"""A target's weights, each process reading only the slices that its own devices hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jeagle.targets.decoder import Decoder
from jeagle.targets.families import Family, family_of, read_spec
from jeagle.targets.narrow import NARROW, narrowed
from jeagle.targets.pieces import Reader, sharding_of
from jeagle.targets.spec import TargetSpec
from jeagle.targets.weights import WeightSource

Progress = Callable[[int, int], None]


class Target(NamedTuple):
    """A frozen target: its shape, and its decoder split into a static and an array part."""

    spec: TargetSpec
    graphdef: Any
    state: Any

    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.state)


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

    Args:
      stored: keep the layers' kernels in memory as one of `NARROW` (half the bytes of bfloat16), scaled by column.
      family: a description that replaces the one found by the architecture's name.
      progress: called with bytes loaded and bytes in all.

    Raises:
      UserError: for an unsupported architecture or switch, or a tensor that is missing or of another shape.
    """
    spec = read_spec(source.config, family)
    abstract = abstract_target(spec, dtype, stacked=stacked, stored=stored, mesh=mesh)
    names = (family or family_of(source.config)).names
    reader = Reader(source, names, mesh, jnp.dtype(dtype))
    groups, stacks = abstract.model().groups, abstract.model().stacked
    leaves = dict(nnx.to_flat_state(abstract.state))
    total = sum(leaf.get_value().size for leaf in leaves.values()) * jnp.dtype(dtype).itemsize
    arrays: dict[Any, jax.Array] = {}
    done = 0
    for path, leaf in leaves.items():
        if path in arrays:
            continue
        key, group = parameter_key(path)
        like = leaf.get_value()
        scale = scale_path(path)
        block, layers = (None, None) if group is None else groups[group]
        array = reader.load(key, like.shape, block, layers if layers is None or stacks else layers[0])
        if stored and scale in leaves:
            axes = sharding_of(key, like.shape, mesh)
            arrays[path], arrays[scale] = narrowed(array, NARROW[stored], axes)
        else:
            arrays[path] = array
        done += like.size * jnp.dtype(dtype).itemsize
        progress(min(done, total), total)
    state = nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves.items()])
    return Target(spec, abstract.graphdef, state)


def parameter_key(path: tuple[Any, ...]) -> tuple[str, int | None]:
    """("blocks", 3, "mlp", "up_proj", "kernel") -> ("blocks.mlp.up_proj.kernel", 3); no number outside the layers."""
    group = next((part for part in path if isinstance(part, int)), None)
    return ".".join(str(part) for part in path if not isinstance(part, int)), group


def scale_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where the scale of a narrow kernel lies."""
    last = str(path[-1])
    return (*path[:-1], "scale" if last == "kernel" else last.replace("_proj", "_scale"))
