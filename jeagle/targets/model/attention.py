"""Attention over time in a target's layers: grouped-query attention and multi-head latent attention.

A mixer (one of these, or the gated delta rule) is built with `BuildOptions`. It is called with x [B, T, H], a
`TokenContext`, its cache (None without one), and the keys and values that earlier layers share with later ones. It
returns its output [B, T, H], its new cache, and the keys and values that it attended to (None where it has none).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from jeagle.layers import (
    LANES,
    AttentionMask,
    Linear,
    masked_attention,
    packed_attention,
    rms_norm,
    rotate_by,
    yarn_mscale,
)
from jeagle.runtime.mesh import logical_sharding, platform, row_axes
from jeagle.targets.model.spec import AttentionSpec, LatentSpec

Axes = tuple[str | None, ...]

_HEAD_AXIS = "tensor"  # the mesh axis that heads are split over


class BuildOptions(NamedTuple):
    """Options that every part of a decoder is built with.

    Attributes:
      dtype: type of the operands of matrix products.
      rngs: random numbers for the initial parameters.
      stored: the narrow type that kernels are stored in; None = `dtype`'s own.
      mesh: the devices, for experts and for attention on TPUs; None = one device.
    """

    dtype: Any
    rngs: nnx.Rngs
    stored: Any = None
    mesh: Mesh | None = None

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        """A linear layer in these types."""
        return Linear(inputs, outputs, self.dtype, self.rngs, bias=bias, stored=self.stored)


class KVCache(NamedTuple):
    """Rotated keys and values of a layer, each [B, S, G, C]; stacked layers have one more leading axis.

    Latent attention stores its latents [B, S, 1, R] as keys, and the rotated keys that all heads share as values.
    """

    keys: jax.Array
    values: jax.Array

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Logical axes of each array, without the leading axis of a stack."""
        return (("rows", None, "heads", None),) * 2


class TokenContext(NamedTuple):
    """Where the tokens of a call stand, and which keys they may attend to.

    Attributes:
      positions_BT: position of each token within its document.
      segments_BT: document of each token of packed rows; None where there is a cache.
      mask: which keys each query may attend to; the keys are those of the cache where there is one.
      lengths_BT: length of each token's document; None where no rotary embedding depends on it.
      count_B: with a cache, the number of real tokens in each row; the tokens after them are padding.
      slots_BT: with a cache, the slot that each token is written to; None where it is the token's position.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    mask: AttentionMask
    lengths_BT: jax.Array | None = None
    count_B: jax.Array | None = None
    slots_BT: jax.Array | None = None


def write_cache(cache: KVCache, fresh: KVCache, context: TokenContext) -> KVCache:
    """Returns `cache` with the fresh keys and values [B, T, G, C] written to the slots of their tokens."""
    slots_BT = context.positions_BT if context.slots_BT is None else context.slots_BT
    rows = jnp.arange(slots_BT.shape[0])[:, None]
    return KVCache(*(old.at[rows, slots_BT].set(new.astype(old.dtype)) for old, new in zip(cache, fresh, strict=True)))


def cache_shardings(caches: Any, mesh: Mesh) -> Any:
    """Shardings of caches: rows are split as batches are, heads as the model's own heads are."""

    def sharding(array: Any, axes: Axes) -> NamedSharding:
        stack = (None,) * (array.ndim - len(axes))
        return NamedSharding(mesh, logical_sharding(stack + axes, array.shape, mesh))

    return tuple(None if cache is None else type(cache)(*map(sharding, cache, cache.axes)) for cache in caches)


def attend_on_mesh(
    queries_BTQC: Float[Array, "B T Q C"],
    keys_BSGC: Float[Array, "B S G C"],
    values_BSGE: Float[Array, "B S G E"],
    mask: AttentionMask,
    dtype: Any,
    mesh: Mesh | None,
    **options: Any,
) -> Float[Array, "B T Q E"]:
    """Computes `layers.masked_attention`; packed rows on TPUs go through the splash kernel instead.

    Args:
      mesh: the devices that the model lies on; None = one device.
      options: the keyword arguments of `layers.masked_attention`.
    """
    arrays = queries_BTQC, keys_BSGC, values_BSGE
    head_shards = 1 if mesh is None else mesh.shape[_HEAD_AXIS]
    packed = mask.query_segments_BT is not None and queries_BTQC.shape[1] % LANES == 0
    if platform(mesh) != "tpu" or not packed or keys_BSGC.shape[2] % head_shards:
        return masked_attention(*arrays, mask, dtype, **options)
    if mesh is not None and mesh.size > 1:
        options["row_axes"] = row_axes(mesh, len(queries_BTQC))
        options["head_axis"] = _HEAD_AXIS if head_shards > 1 else None
    return packed_attention(*arrays, mask, dtype, mesh=mesh, **options)


class GroupedQueryAttention(nnx.Module):
    """Grouped-query attention with every option of `AttentionSpec`.

    Source: GQA (arXiv 2305.13245).
    """

    def __init__(self, spec: AttentionSpec, width: int, eps: float, build: BuildOptions):
        query_width, key_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = build.linear(width, query_width, spec.qkv_bias)
        self.o_proj = build.linear(query_width, width, spec.out_bias)
        if not spec.read_kv_from:
            self.k_proj = build.linear(width, key_width, spec.qkv_bias)
            if not spec.values_are_keys:
                self.v_proj = build.linear(width, key_width, spec.qkv_bias)
        if spec.gated:
            self.gate_proj = build.linear(width, query_width, spec.qkv_bias)
        if spec.qk_norm in ("head", "all_heads"):
            widths = (query_width, key_width) if spec.qk_norm == "all_heads" else (spec.head_dim, spec.head_dim)
            self.q_norm = nnx.Param(jnp.ones(widths[0]))
            if not spec.read_kv_from:
                self.k_norm = nnx.Param(jnp.ones(widths[1]))
        if spec.sinks:
            self.sinks = nnx.Param(jnp.zeros(spec.heads))
        self.spec, self.eps, self.dtype, self.mesh = spec, eps, build.dtype, build.mesh

    def __call__(self, x: jax.Array, context: TokenContext, cache: KVCache | None, shared: dict[str, KVCache]):
        """Mixes x [B, T, H] over time; see `mixer` for arguments and results."""
        spec = self.spec

        def split_heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], -1, spec.head_dim)

        def heads_of(x: jax.Array, norm: str) -> jax.Array:
            """Normalised and rotated queries or keys, [B, T, heads, C], of their projection."""
            if spec.qk_norm == "all_heads":
                x = rms_norm(x, getattr(self, norm)[...], self.eps)
            x = split_heads(x)
            if spec.qk_norm == "head":
                x = rms_norm(x, getattr(self, norm)[...], self.eps)
            if spec.rope is not None:
                x = rotate_by(spec.rope, x, context.positions_BT, context.lengths_BT, interleaved=spec.interleaved)
            return rms_norm(x, None, self.eps) if spec.qk_norm == "rotated" else x

        queries = heads_of(self.q_proj(x), "q_norm")
        if (temperature := spec.temperature) is not None:
            steps = jnp.floor((context.positions_BT + temperature.start) / temperature.span)
            queries = queries * (1 + temperature.beta * jnp.log1p(steps))[..., None, None]
        if spec.read_kv_from:
            keys_values = shared[spec.read_kv_from]
        else:
            raw_keys = self.k_proj(x)
            values = split_heads(raw_keys if spec.values_are_keys else self.v_proj(x))
            if spec.value_norm:
                values = rms_norm(values, None, self.eps)
            keys_values = KVCache(heads_of(raw_keys, "k_norm"), values)
            if cache is not None:
                keys_values = cache = write_cache(cache, keys_values, context)
        options = {name: getattr(spec, name) for name in ("window", "chunk", "scale", "soft_cap")}
        options["sinks_Q"] = self.sinks[...] if spec.sinks else None
        mixed = attend_on_mesh(queries, *keys_values, context.mask, self.dtype, self.mesh, **options)
        mixed = mixed.reshape(*x.shape[:-1], -1)
        if spec.gated:
            mixed = mixed * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(mixed), cache, keys_values

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> KVCache | None:
        """An empty cache for `rows` sequences of up to `length` tokens; None where the layer has no keys of its own."""
        if self.spec.read_kv_from:
            return None
        shape = (rows, length, self.spec.kv_heads, self.spec.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class LatentAttention(nnx.Module):
    """Multi-head latent attention (MLA).

    Without a cache, keys and values are expanded from the latents; with one, the queries are projected into the latent
    space, so that only latents are read.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    def __init__(self, spec: LatentSpec, width: int, eps: float, build: BuildOptions):
        query_width = spec.heads * (spec.nope_dim + spec.rope_dim)
        if spec.q_rank:
            self.q_a_proj = build.linear(width, spec.q_rank, spec.bias)
            self.q_a_norm = nnx.Param(jnp.ones(spec.q_rank))
            self.q_b_proj = build.linear(spec.q_rank, query_width)
        else:
            self.q_proj = build.linear(width, query_width)
        self.kv_a_proj = build.linear(width, spec.kv_rank + spec.rope_dim, spec.bias)
        self.kv_a_norm = nnx.Param(jnp.ones(spec.kv_rank))
        self.k_b_proj = Linear(spec.kv_rank, spec.heads * spec.nope_dim, build.dtype, build.rngs)
        self.v_b_proj = Linear(spec.kv_rank, spec.heads * spec.value_dim, build.dtype, build.rngs)
        self.o_proj = build.linear(spec.heads * spec.value_dim, width, spec.bias)
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
        # YaRN's factor enters the scale of the scores where the model applies it to all dimensions.
        scaling, scale = spec.rope.scaling_dict, (spec.nope_dim + spec.rope_dim) ** -0.5
        if scaling.get("rope_type", "default") != "default" and scaling.get("mscale_all_dim"):
            scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        if cache is None:  # one key and one value for each head, made from the latents
            heads = (*x.shape[:2], spec.heads, -1)
            keys, values = (proj(latents.keys[:, :, 0]).reshape(heads) for proj in (self.k_b_proj, self.v_b_proj))
            shared_part = jnp.broadcast_to(latents.values, (*keys.shape[:3], spec.rope_dim))
            keys, queries = jnp.concatenate([keys, shared_part], -1), jnp.concatenate([nope, rotated], -1)
            mixed = attend_on_mesh(queries, keys, values, context.mask, self.dtype, self.mesh, scale=scale)
        else:
            latents = cache = write_cache(cache, latents, context)
            mixed = self._absorbed(nope, rotated, latents, context.mask, scale)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), cache, latents

    def _absorbed(
        self, nope: jax.Array, rotated: jax.Array, latents: KVCache, mask: AttentionMask, scale: float
    ) -> jax.Array:
        """Attention with the latent as the only key head: q (W c) = (q W) c, and values are expanded after the sum."""
        total = jnp.promote_types(self.dtype, jnp.float32)
        kernels = (self.spec.kv_rank, self.spec.heads, -1)
        into, out = self.k_b_proj.kernel[...].reshape(kernels), self.v_b_proj.kernel[...].reshape(kernels)
        nope, into, out = (array.astype(self.dtype) for array in (nope, into, out))
        queries = jnp.einsum("btqc,rqc->btqr", nope, into, preferred_element_type=total)
        queries = jnp.concatenate([queries, rotated], -1)
        keys = jnp.concatenate([latents.keys, latents.values], -1)
        mixed = masked_attention(queries, keys, latents.keys, mask, self.dtype, scale=scale).astype(self.dtype)
        return jnp.einsum("btqr,rqe->btqe", mixed, out, preferred_element_type=total)

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> KVCache:
        """An empty cache for `rows` sequences of up to `length` tokens."""
        lead = (rows, length, 1)
        return KVCache(jnp.zeros((*lead, self.spec.kv_rank), dtype), jnp.zeros((*lead, self.spec.rope_dim), dtype))
