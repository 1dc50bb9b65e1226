"""How a draft's parameters are sharded over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
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
