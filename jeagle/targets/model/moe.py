"""Mixtures of experts: a router chooses a few gated MLPs for each token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jeagle.layers import GATES, Dense, Linear, rms_norm
from jeagle.runtime.mesh import row_axes
from jeagle.targets.model.attention import BuildOptions
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
            options = {"activation": spec.activation, "stored": build.stored}
            self.shared = Dense(width, spec.shared_width, build.dtype, build.rngs, **options)
        if spec.shared_gate:
            self.shared_gate = Linear(width, 1, build.dtype, build.rngs)
        self.spec, self.eps = spec, eps

    def __call__(self, x: jax.Array, router_input: jax.Array) -> jax.Array:
        """x and router_input [B, T, H] -> float32 [B, T, H]."""
        chosen, weights = self.router(router_input, self.eps)
        out = self.experts(x, chosen, weights)
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
        scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "chosen": jnp.asarray}[spec.scores](logits)
        ranking = scores + self.correction[...] if spec.correction else scores
        if spec.groups:  # all experts but those of the best groups are ranked last
            grouped = ranking.reshape(*ranking.shape[:-1], spec.groups, -1)
            best_of_each = jax.lax.top_k(grouped, 1 if spec.group_score == "max" else 2)[0].sum(axis=-1)
            _, best = jax.lax.top_k(best_of_each, spec.chosen_groups)
            in_best = jax.nn.one_hot(best, spec.groups, dtype=bool).any(axis=-2)
            ranking = jnp.where(in_best[..., None], grouped, -jnp.inf).reshape(ranking.shape)
        _, chosen = jax.lax.top_k(ranking, self.chosen)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if spec.scores == "chosen":
            weights = jax.nn.softmax(weights, axis=-1)
        if spec.renormalised:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        weights = weights * spec.scale
        return chosen, weights * self.expert_scale[...][chosen] if spec.normed else weights


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
        for part, outputs in (("gate", inner), ("up", inner), ("down", width)):
            if stored is not None:
                setattr(self, f"{part}_scale", nnx.Param(jnp.ones((count, outputs))))
            if spec.bias:
                setattr(self, f"{part}_bias", nnx.Param(jnp.zeros((count, outputs))))
        clamped = functools.partial(clamped_swiglu, alpha=spec.clamp[0], limit=spec.clamp[1])
        self.gate = clamped if spec.activation == "clamped_swiglu" else GATES[spec.activation]
        self.dtype, self.mesh, self.weighs_input = build.dtype, build.mesh, spec.router.weighs_input

    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """x [B, T, H], chosen and weights [B, T, k] -> float32 [B, T, H]."""
        params = {name: getattr(self, name)[...] for name in _PARTITIONS if hasattr(self, name)}
        mesh = self.mesh
        if mesh is None or mesh.size == 1:
            return self._own_experts(x, chosen, weights, params, 0)
        rows = row_axes(mesh, x.shape[0])  # the expert axis may be one of them
        specs = {}
        for name, param in params.items():  # an axis that does not divide a dimension evenly does not split it
            axes = zip(_PARTITIONS[name], param.shape, strict=True)
            specs[name] = PartitionSpec(*(a if a in mesh.shape and n % mesh.shape[a] == 0 else None for a, n in axes))
        expert_axis, _, tensor_axis = specs["gate_proj"]
        tokens_split_by_expert_axis = expert_axis is not None and _EXPERT in rows

        def on_device(x: jax.Array, chosen: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
            if tokens_split_by_expert_axis:
                x, chosen, weights = (
                    jax.lax.all_gather(array, _EXPERT, axis=0, tiled=True) for array in (x, chosen, weights)
                )
            first = jax.lax.axis_index(_EXPERT) * params["gate_proj"].shape[0] if expert_axis else 0
            adds_bias = (jax.lax.axis_index(_TENSOR) == 0) if tensor_axis else True
            out = self._own_experts(x, chosen, weights, params, first, adds_bias)
            if tokens_split_by_expert_axis:
                out = jax.lax.psum_scatter(out, _EXPERT, scatter_dimension=0, tiled=True)
            summed = tuple(axis for axis in (None if tokens_split_by_expert_axis else expert_axis, tensor_axis) if axis)
            return jax.lax.psum(out, summed) if summed else out

        if not self.weighs_input:
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
        inputs = flat[token] * weight if self.weighs_input else flat[token]

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
        out = jnp.where((expert < count)[:, None], out if self.weighs_input else out * weight, 0.0)
        return jnp.zeros(flat.shape, out.dtype).at[token].add(out).reshape(x.shape)


_PARTITIONS: dict[str, tuple[str | None, ...]] = {f"{part}_proj": (_EXPERT, None, _TENSOR) for part in ("gate", "up")}
_PARTITIONS |= {"down_proj": (_EXPERT, _TENSOR, None), "down_scale": (_EXPERT, None), "down_bias": (_EXPERT, None)}
_PARTITIONS |= {f"{part}_{kind}": (_EXPERT, _TENSOR) for part in ("gate", "up") for kind in ("scale", "bias")}
