"""Grouped-query attention of a target's layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import Linear, rms_norm, rotate_by
from jeagle.targets.model.mixer import BuildOptions, KVCache, TokenContext, attend_on_mesh, write_cache
from jeagle.targets.model.spec import AttentionSpec


class GroupedQueryAttention(nnx.Module):
    """Grouped-query attention with every option of `AttentionSpec`.

    Source: GQA (arXiv 2305.13245).
    """

    def __init__(self, spec: AttentionSpec, width: int, eps: float, build: BuildOptions):
        query_width, key_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, build.dtype, build.rngs, bias=bias, stored=build.stored)

        self.q_proj = linear(width, query_width, spec.qkv_bias)
        self.o_proj = linear(query_width, width, spec.out_bias)
        if not spec.read_kv_from:
            self.k_proj = linear(width, key_width, spec.qkv_bias)
            if not spec.values_are_keys:
                self.v_proj = linear(width, key_width, spec.qkv_bias)
        if spec.gated:
            self.gate_proj = linear(width, query_width, spec.qkv_bias)
        if spec.qk_norm in ("head", "all_heads"):
            over_all = spec.qk_norm == "all_heads"
            self.q_norm = nnx.Param(jnp.ones(query_width if over_all else spec.head_dim))
            if not spec.read_kv_from:
                self.k_norm = nnx.Param(jnp.ones(key_width if over_all else spec.head_dim))
        if spec.sinks:
            self.sinks = nnx.Param(jnp.zeros(spec.heads))
        self.spec, self.eps, self.dtype, self.mesh = spec, eps, build.dtype, build.mesh

    def __call__(self, x: jax.Array, context: TokenContext, cache: KVCache | None, shared: dict[str, KVCache]):
        """Mixes x [B, T, H] over time; see `mixer` for arguments and results."""
        spec = self.spec
        queries = self._heads_of(self.q_proj(x), "q_norm", context)
        if (temperature := spec.temperature) is not None:
            steps = jnp.floor((context.positions_BT + temperature.start) / temperature.span)
            queries = queries * (1 + temperature.beta * jnp.log1p(steps))[..., None, None]
        if spec.read_kv_from:
            keys_values = shared[spec.read_kv_from]
        else:
            raw_keys = self.k_proj(x)
            values = self._split_heads(raw_keys if spec.values_are_keys else self.v_proj(x))
            if spec.value_norm:
                values = rms_norm(values, None, self.eps)
            keys_values = KVCache(self._heads_of(raw_keys, "k_norm", context), values)
            if cache is not None:
                keys_values = cache = write_cache(cache, keys_values, context.positions_BT)
        mixed = attend_on_mesh(
            queries,
            keys_values.keys,
            keys_values.values,
            context.mask,
            self.dtype,
            self.mesh,
            window=spec.window,
            chunk=spec.chunk,
            scale=spec.scale,
            soft_cap=spec.soft_cap,
            sinks_Q=self.sinks[...] if spec.sinks else None,
        )
        mixed = mixed.reshape(*x.shape[:-1], -1)
        if spec.gated:
            mixed = mixed * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(mixed), cache, keys_values

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.spec.head_dim)

    def _heads_of(self, x: jax.Array, norm: str, context: TokenContext) -> jax.Array:
        """Normalised and rotated queries or keys, [B, T, heads, C], of their projection."""
        spec = self.spec
        if spec.qk_norm == "all_heads":
            x = rms_norm(x, getattr(self, norm)[...], self.eps)
        x = self._split_heads(x)
        if spec.qk_norm == "head":
            x = rms_norm(x, getattr(self, norm)[...], self.eps)
        if spec.rope is not None:
            x = rotate_by(spec.rope, x, context.positions_BT, context.lengths_BT, interleaved=spec.interleaved)
        return rms_norm(x, None, self.eps) if spec.qk_norm == "rotated" else x

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> KVCache | None:
        """An empty cache for `rows` sequences of up to `length` tokens; None where the layer has no keys of its own."""
        if self.spec.read_kv_from:
            return None
        shape = (rows, length, self.spec.kv_heads, self.spec.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
