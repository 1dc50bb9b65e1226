"""A target's weights, each process reading only the slices that its own devices hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jeagle.errors import UserError
from jeagle.runtime.mesh import logical_sharding
from jeagle.targets.decoder import Decoder
from jeagle.targets.families import family_of, read_spec
from jeagle.targets.spec import TargetSpec
from jeagle.targets.weights import WeightSource

# Logical axes of every parameter; layers carry a leading stack axis. The mesh axes behind them: runtime.mesh.RULES.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocab", "width"),
    "lm_head": ("vocab", "width"),
    "norm": (None,),
    "layers.input_layernorm": (None, None),
    "layers.post_attention_layernorm": (None, None),
    "layers.attention.q_proj": (None, "width", "heads"),
    "layers.attention.k_proj": (None, "width", "heads"),
    "layers.attention.v_proj": (None, "width", "heads"),
    "layers.attention.o_proj": (None, "heads", "width"),
    "layers.attention.q_bias": (None, "heads"),
    "layers.attention.k_bias": (None, "heads"),
    "layers.attention.v_bias": (None, "heads"),
    "layers.attention.o_bias": (None, None),
    "layers.mlp.gate_proj": (None, "width", "mlp"),
    "layers.mlp.up_proj": (None, "width", "mlp"),
    "layers.mlp.down_proj": (None, "mlp", "width"),
}


class Target(NamedTuple):
    """A frozen target: its shape, and its decoder split into a static and an array part."""

    spec: TargetSpec
    graphdef: Any
    state: Any

    def model(self) -> Decoder:
        return nnx.merge(self.graphdef, self.state)


def abstract_target(spec: TargetSpec, dtype: Any, *, stacked: bool | None = None) -> Target:
    """A Target of shapes without arrays: for ahead-of-time compilation and for loading into."""
    stacked = jax.default_backend() != "cpu" if stacked is None else stacked
    model = nnx.eval_shape(lambda: Decoder(spec, jnp.dtype(dtype), nnx.Rngs(0), stacked=stacked))
    return Target(spec, *nnx.split(model))


def random_target(spec: TargetSpec, dtype: Any, seed: int = 0, *, stacked: bool = False) -> Target:
    """A target with random float32 weights, for tests and benchmarks."""
    return Target(spec, *nnx.split(Decoder(spec, jnp.dtype(dtype), nnx.Rngs(seed), stacked=stacked)))


def load_target(source: WeightSource, mesh: Mesh, dtype: Any, *, stacked: bool | None = None) -> Target:
    """The target of `source`, laid out on `mesh`, kernels in `dtype`, norms in float32.

    Raises:
      UserError: for an unsupported architecture or switch, or a tensor that is missing or of another shape.
    """
    spec = read_spec(source.config)
    names = family_of(source.config).names
    abstract = abstract_target(spec, dtype, stacked=stacked)
    present = set(source.names())
    leaves = []
    for path, leaf in nnx.to_flat_state(abstract.state):
        key, layer = parameter_key(path)
        pattern, like = names[key], leaf.get_value()
        stack = key.startswith("layers.") and layer is None
        wanted = [pattern.format(i=i) for i in range(like.shape[0])] if stack else [pattern.format(i=layer)]
        array = _load(source, present, key, wanted, like, stack, mesh, dtype)
        leaves.append((path, leaf.replace(array)))
    return Target(spec, abstract.graphdef, nnx.from_flat_state(leaves))


def parameter_key(path: tuple[Any, ...]) -> tuple[str, int | None]:
    """("layers", 3, "mlp", "up_proj") -> ("layers.mlp.up_proj", 3); no number where layers are stacked."""
    layer = next((part for part in path if isinstance(part, int)), None)
    return ".".join(str(part) for part in path if not isinstance(part, int)), layer


def _axes(key: str, rank: int) -> tuple[str | None, ...]:
    return AXES[key][len(AXES[key]) - rank :]


def _load(
    source: WeightSource, present: set[str], key: str, names: list[str], like: Any, stack: bool, mesh: Mesh, dtype: Any
) -> jax.Array:
    expected = like.shape[1:] if stack else like.shape
    matrix = len(expected) == 2
    transposed = matrix and key.startswith("layers.")  # embedding and lm_head are kept as rows
    for name in names:
        if name not in present:
            raise UserError(f"The target's weights lack the tensor {name}: the download may be incomplete.")
        shape = tuple(source.shape(name))
        if shape != (expected[::-1] if transposed else expected):
            raise UserError(f"The target's tensor {name} is {shape}; config.json makes it {expected[::-1]}.")
    kind = jnp.dtype(dtype) if matrix else jnp.dtype(jnp.float32)

    def read_one(name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = source.read(name, index[::-1] if transposed else index).astype(kind)
        return part.T if transposed else part

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stack:
            return read_one(names[0], index)
        return np.stack([read_one(name, index[1:]) for name in names[index[0]]])

    sharding = NamedSharding(mesh, logical_sharding(_axes(key, len(like.shape)), like.shape, mesh))
    return jax.make_array_from_callback(like.shape, sharding, read)
