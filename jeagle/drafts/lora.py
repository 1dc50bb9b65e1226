"""Low-rank adapters: instead of a kernel W [I, O], down [I, R] and up [R, O] are trained, and W + down up is used.

Source: Hu et al., LoRA (arXiv 2106.09685), with a scale of 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jeagle.drafts.sharding import by_path

WITHOUT_ADAPTER = ("lm_head",)
"""Matrices with a row for each token, which are no maps between features."""


def add_adapters(draft: Any, rank: int, key: jax.Array) -> dict[str, Any]:
    """{"base": the draft's state, "lora": adapters of its kernels}. It starts as the same draft, since `up` is 0."""
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
