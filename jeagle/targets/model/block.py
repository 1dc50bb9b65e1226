"""One layer of a target: a mixer over time, then an MLP, experts, or both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import GATES, Dense, Experts, Linear, rms_norm
from jeagle.runtime.mesh import row_axes
from jeagle.targets.model.attention import Attention
from jeagle.targets.model.build import Build
from jeagle.targets.model.gated_delta import GatedDelta
from jeagle.targets.model.latent_attention import LatentAttention
from jeagle.targets.model.spec import (
    AttentionSpec,
    BlockSpec,
    DeltaSpec,
    DenseSpec,
    ExpertsSpec,
    LatentSpec,
    RouterSpec,
    TargetSpec,
)
from jeagle.targets.model.view import Cache, View

MIXERS: dict[type, Any] = {AttentionSpec: Attention, LatentSpec: LatentAttention, DeltaSpec: GatedDelta}


class Router(nnx.Module):
    """Which experts each token goes to: `RouterSpec` in arithmetic, float32 throughout."""

    def __init__(self, spec: RouterSpec, count: int, chosen: int, width: int, rngs: nnx.Rngs):
        self.proj = Linear(width, count, jnp.float32, rngs, bias=spec.bias)
        if spec.correction:
            self.correction = nnx.Param(jnp.zeros(count))
        if spec.normed:
            self.input_scale, self.expert_scale = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(count))
        self.spec, self.chosen = spec, chosen

    def __call__(self, x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
        """x [B, T, H] -> (chosen [B, T, k] int32, weights [B, T, k] float32)."""
        spec = self.spec
        if spec.normed:
            x = rms_norm(x, None, eps) * self.input_scale[...] * x.shape[-1] ** -0.5
        logits = self.proj(x)
        scores = jax.nn.softmax(logits, axis=-1) if spec.scores == "softmax" else logits
        scores = jax.nn.sigmoid(logits) if spec.scores == "sigmoid" else scores
        ranking = scores + self.correction[...] if spec.correction else scores
        if spec.groups:
            ranking = self._within_groups(ranking)
        _, chosen = jax.lax.top_k(ranking, self.chosen)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if spec.scores == "chosen":
            weights = jax.nn.softmax(weights, axis=-1)
        if spec.renormalised:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        weights = weights * spec.scale
        return chosen, weights * self.expert_scale[...][chosen] if spec.normed else weights

    def _within_groups(self, ranking: jax.Array) -> jax.Array:
        spec = self.spec
        grouped = ranking.reshape(*ranking.shape[:-1], spec.groups, -1)
        if spec.group_score == "max":
            merit = grouped.max(axis=-1)
        else:
            merit = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        _, best = jax.lax.top_k(merit, spec.chosen_groups)
        kept = jax.nn.one_hot(best, spec.groups, dtype=bool).any(axis=-2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranking.shape)


class Mixture(nnx.Module):
    """A router, its experts, and the MLP that every token goes through beside them."""

    def __init__(self, spec: ExpertsSpec, width: int, eps: float, build: Build):
        self.router = Router(spec.router, spec.count, spec.chosen, width, build.rngs)
        self.experts = Experts(
            width,
            spec.width,
            spec.count,
            build.dtype,
            build.rngs,
            activation=spec.activation,
            bias=spec.bias,
            clamp=spec.clamp,
            stored=build.stored,
            mesh=build.mesh,
        )
        if spec.shared_width:
            self.shared = _dense(DenseSpec(spec.shared_width, spec.activation), width, build)
        if spec.shared_gate:
            self.shared_gate = Linear(width, 1, build.dtype, build.rngs)
        self.spec, self.eps, self.mesh = spec, eps, build.mesh

    def __call__(self, x: jax.Array, router_reads: jax.Array) -> jax.Array:
        chosen, weights = self.router(router_reads, self.eps)
        rows = () if self.mesh is None else row_axes(self.mesh, x.shape[0])
        out = self.experts(x, chosen, weights, weighs_input=self.spec.router.weighs_input, rows=rows)
        if self.spec.shared_width:
            shared = self.shared(x)
            out = out + (jax.nn.sigmoid(self.shared_gate(x)) * shared if self.spec.shared_gate else shared)
        return out


def _dense(spec: DenseSpec, width: int, build: Build) -> Dense:
    return Dense(
        width,
        spec.width,
        build.dtype,
        build.rngs,
        activation=spec.activation,
        bias=spec.bias,
        stored=build.stored,
    )


class Block(nnx.Module):
    """x -> x + mixer(norm(x)) -> x + mlp(norm(x)), with the family's own norms around them."""

    def __init__(self, spec: BlockSpec, target: TargetSpec, build: Build):
        width, eps = target.width, target.norm_eps

        def norm() -> nnx.Param:
            return nnx.Param(jnp.ones(width))

        if spec.norms in ("pre", "both"):
            self.before_mixer, self.before_mlp = norm(), norm()
        if spec.norms in ("post", "both"):
            self.after_mixer, self.after_mlp = norm(), norm()
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, width, eps, build)
        if spec.mlp is not None:
            self.mlp = _dense(spec.mlp, width, build)
        if spec.experts is not None:
            self.mixture = Mixture(spec.experts, width, eps, build)
        if spec.mlp is not None and spec.experts is not None:
            self.after_dense, self.before_experts, self.after_experts = norm(), norm(), norm()
        if spec.per_layer_width:
            self.per_layer_gate = Linear(width, spec.per_layer_width, build.dtype, build.rngs, stored=build.stored)
            self.per_layer_out = Linear(spec.per_layer_width, width, build.dtype, build.rngs, stored=build.stored)
            self.per_layer_norm = norm()
        if spec.scaled:
            self.output_scale = nnx.Param(jnp.ones(1))
        self.spec, self.eps = spec, eps

    def __call__(self, x: jax.Array, view: View, kept: Any, shared: dict[str, Cache], extra_BTP: jax.Array | None):
        """-> (x, what the mixer keeps, the keys and values it attended to)."""
        mixed, kept, pair = self.mixer(self._norm("before_mixer", x), view, kept, shared)
        x = x + self._norm("after_mixer", mixed) * self.spec.residual
        x = x + self._norm("after_mlp", self._feed_forward(x)) * self.spec.residual
        if self.spec.per_layer_width:
            assert self.spec.mlp is not None
            gated = GATES[self.spec.mlp.activation](self.per_layer_gate(x), extra_BTP)
            x = x + rms_norm(self.per_layer_out(gated), self.per_layer_norm[...], self.eps)
        return (x * self.output_scale[...] if self.spec.scaled else x), kept, pair

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        read = self._norm("before_mlp", x)
        if self.spec.experts is None:
            return self.mlp(read)
        if self.spec.mlp is None:
            return self.mixture(read, read)
        dense = self._norm("after_dense", self.mlp(read))
        return dense + self._norm("after_experts", self.mixture(self._norm("before_experts", x), x))

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, getattr(self, name)[...], self.eps) if hasattr(self, name) else x
