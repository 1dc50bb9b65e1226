"""Multi-head latent attention of a target's layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import Linear, masked_attention, rms_norm, rotate_by, yarn_mscale
from jeagle.targets.model.mixer import BuildOptions, KVCache, TokenContext, attend_on_mesh, write_cache
from jeagle.targets.model.spec import LatentSpec


class LatentAttention(nnx.Module):
    """Multi-head latent attention (MLA).

    Without a cache, keys and values are expanded from the latents; with one, the queries are projected into the latent
    space, so that only latents are read.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    def __init__(self, spec: LatentSpec, width: int, eps: float, build: BuildOptions):
        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, build.dtype, build.rngs, bias=bias, stored=build.stored)

        query_width = spec.heads * (spec.nope_dim + spec.rope_dim)
        if spec.q_rank:
            self.q_a_proj = linear(width, spec.q_rank, spec.bias)
            self.q_a_norm = nnx.Param(jnp.ones(spec.q_rank))
            self.q_b_proj = linear(spec.q_rank, query_width)
        else:
            self.q_proj = linear(width, query_width)
        self.kv_a_proj = linear(width, spec.kv_rank + spec.rope_dim, spec.bias)
        self.kv_a_norm = nnx.Param(jnp.ones(spec.kv_rank))
        self.k_b_proj = Linear(spec.kv_rank, spec.heads * spec.nope_dim, build.dtype, build.rngs)
        self.v_b_proj = Linear(spec.kv_rank, spec.heads * spec.value_dim, build.dtype, build.rngs)
        self.o_proj = linear(spec.heads * spec.value_dim, width, spec.bias)
        self.spec, self.dtype, self.mesh = spec, build.dtype, build.mesh
        self.eps = 1e-6  # the two inner norms have this epsilon in every model, whatever config.json says

    def __call__(self, x: jax.Array, context: TokenContext, cache: KVCache | None, shared: dict[str, KVCache]):
        """Mixes x [B, T, H] over time; see `mixer` for arguments and results."""
        spec = self.spec

        def rotate(x: jax.Array) -> jax.Array:
            return rotate_by(spec.rope, x, context.positions_BT, context.lengths_BT, interleaved=spec.interleaved)

        if spec.q_rank:
            queries = self.q_b_proj(rms_norm(self.q_a_proj(x), self.q_a_norm[...], self.eps))
        else:
            queries = self.q_proj(x)
        nope, rotated = jnp.split(queries.reshape(*x.shape[:-1], spec.heads, -1), [spec.nope_dim], axis=-1)
        rotated = rotate(rotated)
        latent, key = jnp.split(self.kv_a_proj(x), [spec.kv_rank], axis=-1)
        latent = rms_norm(latent, self.kv_a_norm[...], self.eps)[:, :, None]
        latents = KVCache(latent, rotate(key[:, :, None]))
        if cache is None:
            mixed = self._expanded(nope, rotated, latents, context)
        else:
            latents = cache = write_cache(cache, latents, context.positions_BT)
            mixed = self._absorbed(nope, rotated, latents, context)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), cache, latents

    def _expanded(self, nope: jax.Array, rotated: jax.Array, latents: KVCache, context: TokenContext) -> jax.Array:
        """Attention with one key and one value for each head, made from the latents."""
        heads = (*latents.keys.shape[:2], self.spec.heads, -1)
        keys = self.k_b_proj(latents.keys[:, :, 0]).reshape(heads)
        values = self.v_b_proj(latents.keys[:, :, 0]).reshape(heads)
        keys = jnp.concatenate([keys, jnp.broadcast_to(latents.values, (*keys.shape[:3], self.spec.rope_dim))], axis=-1)
        queries = jnp.concatenate([nope, rotated], axis=-1)
        return attend_on_mesh(queries, keys, values, context.mask, self.dtype, self.mesh, scale=self._scale())

    def _absorbed(self, nope: jax.Array, rotated: jax.Array, latents: KVCache, context: TokenContext) -> jax.Array:
        """Attention with the latent as the only key head: q (W c) = (q W) c, and values are expanded after the sum."""
        total = jnp.promote_types(self.dtype, jnp.float32)
        kernels = (self.spec.kv_rank, self.spec.heads, -1)
        into, out = self.k_b_proj.kernel[...].reshape(kernels), self.v_b_proj.kernel[...].reshape(kernels)
        queries = jnp.einsum(
            "btqc,rqc->btqr", nope.astype(self.dtype), into.astype(self.dtype), preferred_element_type=total
        )
        queries = jnp.concatenate([queries, rotated], -1)
        keys = jnp.concatenate([latents.keys, latents.values], -1)
        mixed = masked_attention(queries, keys, latents.keys, context.mask, self.dtype, scale=self._scale())
        return jnp.einsum(
            "btqr,rqe->btqe", mixed.astype(self.dtype), out.astype(self.dtype), preferred_element_type=total
        )

    def _scale(self) -> float:
        """Scale of the scores, with YaRN's factor where the model applies it to all dimensions."""
        scaling, scale = self.spec.rope.scaling_dict, (self.spec.nope_dim + self.spec.rope_dim) ** -0.5
        if scaling.get("rope_type", "default") != "default" and scaling.get("mscale_all_dim"):
            scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return scale

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `length` tokens."""
        lead = (rows, length, 1)
        return KVCache(jnp.zeros((*lead, self.spec.kv_rank), dtype), jnp.zeros((*lead, self.spec.rope_dim), dtype))
