"""One layer of a target: a mixer over time, then an MLP, experts, or both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import GATES, Dense, Linear, rms_norm
from jeagle.targets.model.attention import GroupedQueryAttention
from jeagle.targets.model.gated_delta import GatedDelta
from jeagle.targets.model.latent_attention import LatentAttention
from jeagle.targets.model.mixer import BuildOptions, KVCache, TokenContext
from jeagle.targets.model.moe import MoE
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DeltaSpec, LatentSpec, TargetSpec

MIXERS: dict[type, Any] = {AttentionSpec: GroupedQueryAttention, LatentSpec: LatentAttention, DeltaSpec: GatedDelta}


class Block(nnx.Module):
    """x -> x + mixer(norm(x)) -> x + mlp(norm(x)), with the norms that `BlockSpec` names."""

    def __init__(self, spec: BlockSpec, target: TargetSpec, build: BuildOptions):
        width, eps = target.width, target.norm_eps

        def norm() -> nnx.Param:
            return nnx.Param(jnp.ones(width))

        if spec.norms in ("pre", "both"):
            self.before_mixer, self.before_mlp = norm(), norm()
        if spec.norms in ("post", "both"):
            self.after_mixer, self.after_mlp = norm(), norm()
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, width, eps, build)
        if (mlp := spec.mlp) is not None:
            options = {"activation": mlp.activation, "bias": mlp.bias, "stored": build.stored}
            self.mlp = Dense(width, mlp.width, build.dtype, build.rngs, **options)
        if spec.experts is not None:
            self.moe = MoE(spec.experts, width, eps, build)
        if spec.mlp is not None and spec.experts is not None:
            self.after_dense, self.before_experts, self.after_experts = norm(), norm(), norm()
        if spec.per_layer_width:
            self.per_layer_gate = Linear(width, spec.per_layer_width, build.dtype, build.rngs, stored=build.stored)
            self.per_layer_out = Linear(spec.per_layer_width, width, build.dtype, build.rngs, stored=build.stored)
            self.per_layer_norm = norm()
        if spec.scaled:
            self.output_scale = nnx.Param(jnp.ones(1))
        self.spec, self.eps = spec, eps

    def __call__(
        self,
        x: jax.Array,
        context: TokenContext,
        cache: Any,
        shared: dict[str, KVCache],
        per_layer_BTP: jax.Array | None,
    ):
        """x [B, T, H] -> (x, the mixer's new cache, the keys and values that it attended to).

        Args:
          per_layer_BTP: this layer's part of Gemma 4's per-layer inputs.
        """
        mixed, cache, keys_values = self.mixer(self._norm("before_mixer", x), context, cache, shared)
        x = x + self._norm("after_mixer", mixed) * self.spec.residual
        x = x + self._norm("after_mlp", self._feed_forward(x)) * self.spec.residual
        if self.spec.per_layer_width:
            assert self.spec.mlp is not None
            gated = GATES[self.spec.mlp.activation](self.per_layer_gate(x), per_layer_BTP)
            x = x + rms_norm(self.per_layer_out(gated), self.per_layer_norm[...], self.eps)
        return (x * self.output_scale[...] if self.spec.scaled else x), cache, keys_values

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        normed = self._norm("before_mlp", x)
        if self.spec.experts is None:
            return self.mlp(normed)
        if self.spec.mlp is None:
            return self.moe(normed, normed)
        dense = self._norm("after_dense", self.mlp(normed))
        return dense + self._norm("after_experts", self.moe(self._norm("before_experts", x), x))

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, getattr(self, name)[...], self.eps) if hasattr(self, name) else x
