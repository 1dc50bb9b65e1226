"""Mixtures of experts: each token goes through the few gated MLPs that a router chose for it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jeagle.layers.mlp import GATES, clamped_swiglu

# What shard_map splits: experts over their own axis, their insides over tensor. Tokens lie as their rows do.
_EXPERT, _TENSOR = "expert", "tensor"


class Experts(nnx.Module):
    """E gated MLPs [H, F], [H, F], [F, H]; a token's outputs are summed with its weights.

    Tokens are sorted by expert and multiplied in ragged groups, so that the work is that of the chosen experts alone.
    On a mesh every device takes the tokens of its rows, and of those who share them out over the experts' axis, through
    its own experts, and the parts are summed.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        count: int,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        activation: str,
        bias: bool,
        clamp: tuple[float, float],
        stored: Any = None,
        mesh: Mesh | None = None,
    ):
        init = nnx.initializers.normal(0.02)

        def weights(*shape: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape) if stored is None else jnp.zeros(shape, stored))

        self.gate_proj = weights(count, width, inner)
        self.up_proj = weights(count, width, inner)
        self.down_proj = weights(count, inner, width)
        if stored is not None:
            self.gate_scale, self.up_scale = nnx.Param(jnp.ones((count, inner))), nnx.Param(jnp.ones((count, inner)))
            self.down_scale = nnx.Param(jnp.ones((count, width)))
        if bias:
            self.gate_bias, self.up_bias = nnx.Param(jnp.zeros((count, inner))), nnx.Param(jnp.zeros((count, inner)))
            self.down_bias = nnx.Param(jnp.zeros((count, width)))
        clamped = functools.partial(clamped_swiglu, alpha=clamp[0], limit=clamp[1])
        self.gate = clamped if activation == "clamped_swiglu" else GATES[activation]
        self.dtype, self.mesh = dtype, mesh

    def __call__(
        self,
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        *,
        weighs_input: bool,
        rows: tuple[str, ...] = (),
    ) -> jax.Array:
        """x [B, T, H], chosen and weights [B, T, k] -> float32 [B, T, H].

        Args:
          rows: the mesh axes that B is split over, the experts' among them or not.
        """
        parts = {name: getattr(self, name)[...] for name in _SPECS if hasattr(self, name)}
        mesh = self.mesh
        if mesh is None or mesh.size == 1:
            return self._local(x, chosen, weights, parts, weighs_input, 0)
        specs = {name: _fitting(_SPECS[name], parts[name].shape, mesh) for name in parts}
        split = specs["gate_proj"]
        scattered = split[0] is not None and _EXPERT in rows

        def one(x: jax.Array, chosen: jax.Array, weights: jax.Array, parts: dict[str, jax.Array]) -> jax.Array:
            if scattered:
                x, chosen, weights = (
                    jax.lax.all_gather(array, _EXPERT, axis=0, tiled=True) for array in (x, chosen, weights)
                )
            own = parts["gate_proj"].shape[0]
            first = jax.lax.axis_index(_EXPERT) * own if split[0] else 0
            lead = (jax.lax.axis_index(_TENSOR) == 0) if split[2] else True
            out = self._local(x, chosen, weights, parts, weighs_input, first, lead)
            if scattered:
                out = jax.lax.psum_scatter(out, _EXPERT, scatter_dimension=0, tiled=True)
            axes = tuple(axis for axis in (None if scattered else split[0], split[2]) if axis)
            return jax.lax.psum(out, axes) if axes else out

        if not weighs_input:
            x = x.astype(self.dtype)  # as the products would, but before it travels
        tokens = PartitionSpec(rows or None)
        return jax.shard_map(
            one, mesh=mesh, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, check_vma=False
        )(x, chosen, weights, parts)

    def _local(
        self,
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        parts: dict[str, jax.Array],
        weighs_input: bool,
        first: Any,
        lead: Any = True,
    ) -> jax.Array:
        """The outputs of the experts first .. first + E - 1 that `parts` holds."""
        count, each = parts["gate_proj"].shape[0], chosen.shape[-1]
        flat = x.reshape(-1, x.shape[-1])
        expert = chosen.reshape(-1) - first
        expert = jnp.where((expert >= 0) & (expert < count), expert, count)  # others' last, and computed by nobody
        order = jnp.argsort(expert, stable=True)
        expert, token = expert[order], order // each
        sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
        weight = weights.reshape(-1)[order][:, None]
        mine = (expert < count)[:, None]
        read = flat[token] * weight if weighs_input else flat[token]

        def product(name: str, x: jax.Array) -> jax.Array:
            total = jnp.promote_types(self.dtype, jnp.float32)
            kernel = parts[f"{name}_proj"].astype(self.dtype)
            y = jax.lax.ragged_dot(x.astype(self.dtype), kernel, sizes, preferred_element_type=total)
            place = jnp.minimum(expert, count - 1)
            if f"{name}_scale" in parts:
                y = y * parts[f"{name}_scale"][place]
            if f"{name}_bias" in parts:
                # Only one of the devices that share an expert adds what is summed over them.
                bias = parts[f"{name}_bias"][place]
                y = y + (jnp.where(lead, bias, 0.0) if name == "down" else bias)
            return y

        out = product("down", self.gate(product("gate", read), product("up", read)))
        out = jnp.where(mine, out if weighs_input else out * weight, 0.0)
        return jnp.zeros(flat.shape, out.dtype).at[token].add(out).reshape(x.shape)


_SPECS = {
    "gate_proj": (_EXPERT, None, _TENSOR),
    "up_proj": (_EXPERT, None, _TENSOR),
    "down_proj": (_EXPERT, _TENSOR, None),
    "gate_scale": (_EXPERT, _TENSOR),
    "up_scale": (_EXPERT, _TENSOR),
    "down_scale": (_EXPERT, None),
    "gate_bias": (_EXPERT, _TENSOR),
    "up_bias": (_EXPERT, _TENSOR),
    "down_bias": (_EXPERT, None),
}


def _fitting(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes that divide the shape evenly; the others stay whole."""
    return PartitionSpec(
        *(a if a in mesh.shape and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True))
    )
