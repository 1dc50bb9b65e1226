"""A draft's parameters by path: how they are sharded over a mesh, and low-rank adapters (LoRA) of its kernels.

Instead of a kernel W [I, O], adapters down [I, R] and up [R, O] are trained, and W + down up is used.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding

from jeagle.runtime.mesh import logical_sharding

AXES: dict[str, tuple[str | None, ...]] = {
    "fc": (None, "width"),
    "q_proj": ("width", "heads"),
    "k_proj": ("width", "heads"),
    "v_proj": ("width", "heads"),
    "o_proj": ("heads", "width"),
    "gate_proj": ("width", "mlp"),
    "up_proj": ("width", "mlp"),
    "down_proj": ("mlp", "width"),
    "lm_head": ("vocab", "width"),
}
"""Logical axes of the draft's parameters by name; `runtime.mesh.RULES` maps them to mesh axes."""


def draft_sharding(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of the parameter with this path and shape; parameters that AXES does not name are replicated."""
    axes = AXES.get(str(path[-1]), (None,) * len(shape))
    return NamedSharding(mesh, logical_sharding(axes, shape, mesh))


def constrain_draft(state: Any, mesh: Mesh | None) -> Any:
    """Parameters or their gradients, constrained inside jit to the shardings of `draft_sharding`."""
    if mesh is None or mesh.size == 1:
        return state
    if isinstance(state, dict):  # a draft with adapters, which are replicated
        return state | {"base": constrain_draft(state["base"], mesh)}
    shardings = by_path(state, lambda path, leaf: draft_sharding(path, leaf.shape, mesh))
    return jax.lax.with_sharding_constraint(state, shardings)


def by_path(state: Any, function: Callable[[tuple[Any, ...], Any], Any]) -> Any:
    """The state with each parameter replaced by `function(path, leaf)`."""
    leaves = [(path, leaf.replace(function(path, leaf.get_value()))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(leaves)


WITHOUT_ADAPTER = ("lm_head",)
"""Matrices with a row for each token, which are no maps between features."""


def add_adapters(draft: Any, rank: int, key: jax.Array) -> dict[str, Any]:
    """{"base": the draft's state, "lora": adapters of its kernels}. It starts as the same draft, since `up` is 0.

    Source: Hu et al., LoRA (arXiv 2106.09685), with a scale of 1.
    """
    pairs: dict[tuple[Any, ...], jax.Array] = {}
    for number, (path, leaf) in enumerate(nnx.to_flat_state(draft)):
        value = leaf.get_value()
        if value.ndim == 2 and path[-1] not in WITHOUT_ADAPTER:
            down = jax.random.normal(jax.random.fold_in(key, number), (value.shape[0], rank)) / value.shape[0] ** 0.5
            pairs[(*path, "down")], pairs[(*path, "up")] = down, jnp.zeros((rank, value.shape[1]))
    return {"base": draft, "lora": traverse_util.unflatten_dict(pairs)}


def with_adapters(draft: Any) -> Any:
    """The draft's state with its adapters added, where only they get gradients; a state without adapters unchanged."""
    if not (isinstance(draft, dict) and "lora" in draft):
        return draft
    pairs = traverse_util.flatten_dict(draft["lora"])

    def merged(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
        value = jax.lax.stop_gradient(value)
        return value + pairs[(*path, "down")] @ pairs[(*path, "up")] if (*path, "down") in pairs else value

    return by_path(draft["base"], merged)


def merge_adapters(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`with_adapters` for arrays by name: base.X, lora.X.down and lora.X.up become X; other arrays unchanged."""
    base = {name.removeprefix("base."): array for name, array in params.items() if name.startswith("base.")}
    if not base:
        return dict(params)
    for name in base:
        if f"lora.{name}.down" in params:
            base[name] = base[name] + params[f"lora.{name}.down"] @ params[f"lora.{name}.up"]
    return base
