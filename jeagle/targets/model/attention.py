"""Grouped-query attention of a target's layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import Linear, rms_norm, rotate_by
from jeagle.targets.model.build import Build
from jeagle.targets.model.mixing import mix
from jeagle.targets.model.spec import AttentionSpec
from jeagle.targets.model.view import Cache, View, stored


class Attention(nnx.Module):
    """Grouped-query attention with every switch of `AttentionSpec`."""

    def __init__(self, spec: AttentionSpec, width: int, eps: float, build: Build):
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, build.dtype, build.rngs, bias=bias, stored=build.stored)

        self.q_proj = linear(width, queries, spec.qkv_bias)
        self.o_proj = linear(queries, width, spec.out_bias)
        if not spec.read_from:
            self.k_proj = linear(width, keys, spec.qkv_bias)
            if not spec.values_are_keys:
                self.v_proj = linear(width, keys, spec.qkv_bias)
        if spec.gated:
            self.gate_proj = linear(width, queries, spec.qkv_bias)
        if spec.qk_norm in ("head", "whole"):
            whole = spec.qk_norm == "whole"
            self.q_norm = nnx.Param(jnp.ones(queries if whole else spec.head_dim))
            if not spec.read_from:
                self.k_norm = nnx.Param(jnp.ones(keys if whole else spec.head_dim))
        if spec.sinks:
            self.sinks = nnx.Param(jnp.zeros(spec.heads))
        self.spec, self.eps, self.dtype, self.mesh = spec, eps, build.dtype, build.mesh

    def __call__(self, x: jax.Array, view: View, kept: Cache | None, shared: dict[str, Cache]):
        spec = self.spec
        queries = self._placed(self.q_proj(x), "q_norm", view)
        if spec.temperature is not None:
            heat = spec.temperature
            steps = jnp.floor((view.positions_BT + heat.start) / heat.span)
            queries = queries * (1 + heat.beta * jnp.log1p(steps))[..., None, None]
        if spec.read_from:
            pair = shared[spec.read_from]
        else:
            pair = self._keys_values(x, view)
            if kept is not None:
                pair = kept = stored(kept, pair, view.positions_BT)
        mixed = mix(
            queries,
            pair.keys,
            pair.values,
            view.sight,
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
        return self.o_proj(mixed), kept, pair

    def _keys_values(self, x: jax.Array, view: View) -> Cache:
        raw = self.k_proj(x)
        values = self._heads(raw if self.spec.values_are_keys else self.v_proj(x))
        if self.spec.value_norm:
            values = rms_norm(values, None, self.eps)
        return Cache(self._placed(raw, "k_norm", view), values)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.spec.head_dim)

    def _placed(self, x: jax.Array, norm: str, view: View) -> jax.Array:
        """Queries or keys, normed and rotated, as heads."""
        spec = self.spec
        if spec.qk_norm == "whole":
            x = rms_norm(x, getattr(self, norm)[...], self.eps)
        x = self._heads(x)
        if spec.qk_norm == "head":
            x = rms_norm(x, getattr(self, norm)[...], self.eps)
        if spec.rope is not None:
            x = rotate_by(spec.rope, x, view.positions_BT, view.lengths_BT, interleaved=spec.interleaved)
        return rms_norm(x, None, self.eps) if spec.qk_norm == "rotated" else x

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> Cache | None:
        if self.spec.read_from:
            return None
        shape = (rows, length, self.spec.kv_heads, self.spec.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
