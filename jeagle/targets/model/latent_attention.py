"""Multi-head latent attention of a target's layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import Linear, attend, rms_norm, rotate_by, yarn_mscale
from jeagle.targets.model.build import Build
from jeagle.targets.model.mixing import mix
from jeagle.targets.model.spec import LatentSpec
from jeagle.targets.model.view import Cache, View, stored


class LatentAttention(nnx.Module):
    """Multi-head latent attention; without a cache keys and values are made, with one queries go into the latent."""

    def __init__(self, spec: LatentSpec, width: int, eps: float, build: Build):
        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, build.dtype, build.rngs, bias=bias, stored=build.stored)

        queries = spec.heads * (spec.nope_dim + spec.rope_dim)
        if spec.q_rank:
            self.q_a_proj = linear(width, spec.q_rank, spec.bias)
            self.q_a_norm = nnx.Param(jnp.ones(spec.q_rank))
            self.q_b_proj = linear(spec.q_rank, queries)
        else:
            self.q_proj = linear(width, queries)
        self.kv_a_proj = linear(width, spec.kv_rank + spec.rope_dim, spec.bias)
        self.kv_a_norm = nnx.Param(jnp.ones(spec.kv_rank))
        self.k_b_proj = Linear(spec.kv_rank, spec.heads * spec.nope_dim, build.dtype, build.rngs)
        self.v_b_proj = Linear(spec.kv_rank, spec.heads * spec.value_dim, build.dtype, build.rngs)
        self.o_proj = linear(spec.heads * spec.value_dim, width, spec.bias)
        self.spec, self.dtype, self.mesh = spec, build.dtype, build.mesh
        self.eps = 1e-6  # of the two inner norms, whatever the model's own is

    def __call__(self, x: jax.Array, view: View, kept: Cache | None, shared: dict[str, Cache]):
        spec = self.spec
        if spec.q_rank:
            queries = self.q_b_proj(rms_norm(self.q_a_proj(x), self.q_a_norm[...], self.eps))
        else:
            queries = self.q_proj(x)
        nope, turned = jnp.split(queries.reshape(*x.shape[:-1], spec.heads, -1), [spec.nope_dim], axis=-1)
        turned = self._turn(turned, view)
        latent, key = jnp.split(self.kv_a_proj(x), [spec.kv_rank], axis=-1)
        latent = rms_norm(latent, self.kv_a_norm[...], self.eps)[:, :, None]
        pair = Cache(latent, self._turn(key[:, :, None], view))
        if kept is None:
            mixed = self._expanded(nope, turned, pair, view)
        else:
            pair = kept = stored(kept, pair, view.positions_BT)
            mixed = self._absorbed(nope, turned, pair, view)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), kept, pair

    def _expanded(self, nope: jax.Array, turned: jax.Array, pair: Cache, view: View) -> jax.Array:
        heads = (*pair.keys.shape[:2], self.spec.heads, -1)
        keys = self.k_b_proj(pair.keys[:, :, 0]).reshape(heads)
        values = self.v_b_proj(pair.keys[:, :, 0]).reshape(heads)
        keys = jnp.concatenate([keys, jnp.broadcast_to(pair.values, (*keys.shape[:3], self.spec.rope_dim))], axis=-1)
        queries = jnp.concatenate([nope, turned], axis=-1)
        return mix(queries, keys, values, view.sight, self.dtype, self.mesh, scale=self._scale())

    def _absorbed(self, nope: jax.Array, turned: jax.Array, pair: Cache, view: View) -> jax.Array:
        """One key head, the latent itself: q (W c) = (q W) c, and the values' product comes after the sum."""
        total = jnp.promote_types(self.dtype, jnp.float32)
        kernels = (self.spec.kv_rank, self.spec.heads, -1)
        into, out = self.k_b_proj.kernel[...].reshape(kernels), self.v_b_proj.kernel[...].reshape(kernels)
        queries = jnp.einsum(
            "btqc,rqc->btqr", nope.astype(self.dtype), into.astype(self.dtype), preferred_element_type=total
        )
        queries, keys = jnp.concatenate([queries, turned], -1), jnp.concatenate([pair.keys, pair.values], -1)
        mixed = attend(queries, keys, pair.keys, view.sight, self.dtype, scale=self._scale())
        return jnp.einsum(
            "btqr,rqe->btqe", mixed.astype(self.dtype), out.astype(self.dtype), preferred_element_type=total
        )

    def _scale(self) -> float:
        scaling, scale = self.spec.rope.scaling_dict, (self.spec.nope_dim + self.spec.rope_dim) ** -0.5
        if self.spec.scale:
            return self.spec.scale
        if scaling.get("rope_type", "default") != "default" and scaling.get("mscale_all_dim"):
            scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return scale

    def _turn(self, x: jax.Array, view: View) -> jax.Array:
        rope = self.spec.rope
        return rotate_by(rope, x, view.positions_BT, view.lengths_BT, interleaved=self.spec.interleaved)

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> Cache:
        lead = (rows, length, 1)
        return Cache(jnp.zeros((*lead, self.spec.kv_rank), dtype), jnp.zeros((*lead, self.spec.rope_dim), dtype))
