"""Mixtures of experts: a router chooses a few gated MLPs for each token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jeagle.layers import GATES, Dense, Linear, rms_norm
from jeagle.runtime.mesh import row_axes
from jeagle.targets.model.mixer import BuildOptions
from jeagle.targets.model.spec import ExpertsSpec, RouterSpec

_EXPERT, _TENSOR = "expert", "tensor"  # the mesh axes that experts, and their inner width, are split over


def clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """(up + 1) * gate * sigmoid(alpha gate), with gate and up clamped to `limit`; gpt-oss's activation."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


class MoE(nnx.Module):
    """A router, its experts, and the MLP beside them that every token goes through."""

    def __init__(self, spec: ExpertsSpec, width: int, eps: float, build: BuildOptions):
        self.router = Router(spec.router, spec.count, spec.chosen, width, build.rngs)
        self.experts = Experts(spec, width, build)
        if spec.shared_width:
            self.shared = Dense(
                width, spec.shared_width, build.dtype, build.rngs, activation=spec.activation, stored=build.stored
            )
        if spec.shared_gate:
            self.shared_gate = Linear(width, 1, build.dtype, build.rngs)
        self.spec, self.eps, self.mesh = spec, eps, build.mesh

    def __call__(self, x: jax.Array, router_input: jax.Array) -> jax.Array:
        """x and router_input [B, T, H] -> float32 [B, T, H]."""
        chosen, weights = self.router(router_input, self.eps)
        rows = () if self.mesh is None else row_axes(self.mesh, x.shape[0])
        out = self.experts(x, chosen, weights, weighs_input=self.spec.router.weighs_input, rows=rows)
        if self.spec.shared_width:
            shared = self.shared(x)
            out = out + (jax.nn.sigmoid(self.shared_gate(x)) * shared if self.spec.shared_gate else shared)
        return out


class Router(nnx.Module):
    """Chooses the experts of each token and their weights, as `RouterSpec` describes, in float32 throughout."""

    def __init__(self, spec: RouterSpec, count: int, chosen: int, width: int, rngs: nnx.Rngs):
        self.proj = Linear(width, count, jnp.float32, rngs, bias=spec.bias)
        if spec.correction:
            self.correction = nnx.Param(jnp.zeros(count))
        if spec.normed:
            self.input_scale, self.expert_scale = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(count))
        self.spec, self.chosen = spec, chosen

    def __call__(self, x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
        """x [B, T, H] -> (chosen experts [B, T, k] int32, their weights [B, T, k] float32)."""
        spec = self.spec
        if spec.normed:
            x = rms_norm(x, None, eps) * self.input_scale[...] * x.shape[-1] ** -0.5
        logits = self.proj(x)
        scores = jax.nn.softmax(logits, axis=-1) if spec.scores == "softmax" else logits
        scores = jax.nn.sigmoid(logits) if spec.scores == "sigmoid" else scores
        ranking = scores + self.correction[...] if spec.correction else scores
        if spec.groups:
            ranking = self._within_best_groups(ranking)
        _, chosen = jax.lax.top_k(ranking, self.chosen)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if spec.scores == "chosen":
            weights = jax.nn.softmax(weights, axis=-1)
        if spec.renormalised:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        weights = weights * spec.scale
        return chosen, weights * self.expert_scale[...][chosen] if spec.normed else weights

    def _within_best_groups(self, ranking: jax.Array) -> jax.Array:
        """The ranking with -inf for the experts of all but the best groups."""
        spec = self.spec
        grouped = ranking.reshape(*ranking.shape[:-1], spec.groups, -1)
        if spec.group_score == "max":
            group_scores = grouped.max(axis=-1)
        else:
            group_scores = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        _, best = jax.lax.top_k(group_scores, spec.chosen_groups)
        in_best = jax.nn.one_hot(best, spec.groups, dtype=bool).any(axis=-2)
        return jnp.where(in_best[..., None], grouped, -jnp.inf).reshape(ranking.shape)


class Experts(nnx.Module):
    """E gated MLPs with kernels [H, F], [H, F] and [F, H]; the outputs of a token's experts are summed by weight.

    Tokens are sorted by expert and multiplied in ragged groups, so that only the chosen experts are computed. On a
    mesh, each device sends the tokens of its rows, and of the devices that share them over the expert axis, through
    its own experts; the partial sums are then added up.
    """

    def __init__(self, spec: ExpertsSpec, width: int, build: BuildOptions):
        init, count, inner, stored = nnx.initializers.normal(0.02), spec.count, spec.width, build.stored

        def kernels(*shape: int) -> nnx.Param:
            return nnx.Param(init(build.rngs.params(), shape) if stored is None else jnp.zeros(shape, stored))

        self.gate_proj = kernels(count, width, inner)
        self.up_proj = kernels(count, width, inner)
        self.down_proj = kernels(count, inner, width)
        if stored is not None:
            self.gate_scale, self.up_scale = nnx.Param(jnp.ones((count, inner))), nnx.Param(jnp.ones((count, inner)))
            self.down_scale = nnx.Param(jnp.ones((count, width)))
        if spec.bias:
            self.gate_bias, self.up_bias = nnx.Param(jnp.zeros((count, inner))), nnx.Param(jnp.zeros((count, inner)))
            self.down_bias = nnx.Param(jnp.zeros((count, width)))
        alpha, limit = spec.clamp
        clamped = functools.partial(clamped_swiglu, alpha=alpha, limit=limit)
        self.gate = clamped if spec.activation == "clamped_swiglu" else GATES[spec.activation]
        self.dtype, self.mesh = build.dtype, build.mesh

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
          weighs_input: the weights multiply the experts' inputs instead of their outputs.
          rows: the mesh axes that B is split over; the expert axis may be one of them.
        """
        params = {name: getattr(self, name)[...] for name in _PARTITIONS if hasattr(self, name)}
        mesh = self.mesh
        if mesh is None or mesh.size == 1:
            return self._own_experts(x, chosen, weights, params, weighs_input, 0)
        # An axis that does not divide a dimension evenly does not split it.
        specs = {
            name: PartitionSpec(
                *(
                    axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(_PARTITIONS[name], param.shape, strict=True)
                )
            )
            for name, param in params.items()
        }
        expert_axis, _, tensor_axis = specs["gate_proj"]
        tokens_split_by_expert_axis = expert_axis is not None and _EXPERT in rows

        def on_device(x: jax.Array, chosen: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
            if tokens_split_by_expert_axis:
                x, chosen, weights = (
                    jax.lax.all_gather(array, _EXPERT, axis=0, tiled=True) for array in (x, chosen, weights)
                )
            first = jax.lax.axis_index(_EXPERT) * params["gate_proj"].shape[0] if expert_axis else 0
            adds_bias = (jax.lax.axis_index(_TENSOR) == 0) if tensor_axis else True
            out = self._own_experts(x, chosen, weights, params, weighs_input, first, adds_bias)
            if tokens_split_by_expert_axis:
                out = jax.lax.psum_scatter(out, _EXPERT, scatter_dimension=0, tiled=True)
            summed = tuple(axis for axis in (None if tokens_split_by_expert_axis else expert_axis, tensor_axis) if axis)
            return jax.lax.psum(out, summed) if summed else out

        if not weighs_input:
            x = x.astype(self.dtype)  # the products would round it anyway, and fewer bytes are exchanged
        tokens = PartitionSpec(rows or None)
        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, check_vma=False
        )(x, chosen, weights, params)

    def _own_experts(
        self,
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        params: dict[str, jax.Array],
        weighs_input: bool,
        first: Any,
        adds_bias: Any = True,
    ) -> jax.Array:
        """The weighted outputs of the experts first .. first + E - 1, whose parameters are `params`.

        Args:
          adds_bias: whether this device adds the bias of the down projection, whose outputs are summed over devices.
        """
        count, each = params["gate_proj"].shape[0], chosen.shape[-1]
        flat = x.reshape(-1, x.shape[-1])
        expert = chosen.reshape(-1) - first
        expert = jnp.where((expert >= 0) & (expert < count), expert, count)  # other devices' experts come last
        order = jnp.argsort(expert, stable=True)
        expert, token = expert[order], order // each
        sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
        weight = weights.reshape(-1)[order][:, None]
        inputs = flat[token] * weight if weighs_input else flat[token]

        def product(name: str, x: jax.Array) -> jax.Array:
            total = jnp.promote_types(self.dtype, jnp.float32)
            kernel = params[f"{name}_proj"].astype(self.dtype)
            y = jax.lax.ragged_dot(x.astype(self.dtype), kernel, sizes, preferred_element_type=total)
            row = jnp.minimum(expert, count - 1)
            if f"{name}_scale" in params:
                y = y * params[f"{name}_scale"][row]
            if f"{name}_bias" in params:
                bias = params[f"{name}_bias"][row]
                y = y + (jnp.where(adds_bias, bias, 0.0) if name == "down" else bias)
            return y

        out = product("down", self.gate(product("gate", inputs), product("up", inputs)))
        out = jnp.where((expert < count)[:, None], out if weighs_input else out * weight, 0.0)
        return jnp.zeros(flat.shape, out.dtype).at[token].add(out).reshape(x.shape)


_PARTITIONS = {
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
