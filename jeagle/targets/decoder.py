"""The decoder that every target family is run by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import GatedMLP, attend, inverse_frequencies, matmul, rms_norm, rotate
from jeagle.targets.spec import TargetSpec

Mix = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Cache(NamedTuple):
    """Rotated keys and values of a layer, [B, S, G, C] each; stacked layers have a leading axis L."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Projections and rotation; who attends to whom is the caller's `mix`."""

    def __init__(self, spec: TargetSpec, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = nnx.Param(init(rngs.params(), (spec.width, query)))
        self.k_proj = nnx.Param(init(rngs.params(), (spec.width, key)))
        self.v_proj = nnx.Param(init(rngs.params(), (spec.width, key)))
        self.o_proj = nnx.Param(init(rngs.params(), (query, spec.width)))
        if spec.attention_bias:
            self.q_bias = nnx.Param(jnp.zeros(query))
            self.k_bias = nnx.Param(jnp.zeros(key))
            self.v_bias = nnx.Param(jnp.zeros(key))
            self.o_bias = nnx.Param(jnp.zeros(spec.width))
        self.spec, self.dtype = spec, dtype

    def __call__(self, x: jax.Array, positions: jax.Array, mix: Mix, kept: Any) -> tuple[jax.Array, Any]:
        spec = self.spec
        queries, keys, values = self._project(x, "q"), self._project(x, "k"), self._project(x, "v")
        frequencies = inverse_frequencies(spec.rope, spec.head_dim)
        queries, keys = rotate(queries, positions, frequencies), rotate(keys, positions, frequencies)
        mixed, kept = mix(queries, keys, values, kept)
        out = matmul(mixed.reshape(*mixed.shape[:-2], -1), self.o_proj[...], self.dtype)
        return (out + self.o_bias[...] if spec.attention_bias else out), kept

    def _project(self, x: jax.Array, which: str) -> jax.Array:
        y = matmul(x, getattr(self, f"{which}_proj")[...], self.dtype)
        if self.spec.attention_bias:
            y = y + getattr(self, f"{which}_bias")[...]
        return y.reshape(*y.shape[:-1], -1, self.spec.head_dim)


class Block(nnx.Module):
    """One pre-norm layer: attention, then a gated MLP."""

    def __init__(self, spec: TargetSpec, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = nnx.Param(jnp.ones(spec.width))
        self.post_attention_layernorm = nnx.Param(jnp.ones(spec.width))
        self.attention = Attention(spec, dtype, rngs)
        self.mlp = GatedMLP(spec.width, spec.mlp_width, dtype, rngs)
        self.eps = spec.norm_eps

    def __call__(self, x: jax.Array, positions: jax.Array, mix: Mix, kept: Any) -> tuple[jax.Array, Any]:
        mixed, kept = self.attention(rms_norm(x, self.input_layernorm[...], self.eps), positions, mix, kept)
        x = x + mixed
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm[...], self.eps)), kept


class Decoder(nnx.Module):
    """Embedding, L layers, final norm, lm_head.

    The residual stream is float32; matrix products are in `dtype`. Layers are stacked under one scan, so that compile
    time does not grow with depth, or (`stacked` false) separate and unrolled: XLA's CPU backend copies every slice of
    a stacked bfloat16 weight, which makes it several times slower than separate ones.
    """

    def __init__(self, spec: TargetSpec, dtype: Any, rngs: nnx.Rngs, *, stacked: bool):
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Param(init(rngs.params(), (spec.vocab, spec.width)))
        if stacked:
            create = nnx.vmap(lambda rngs: Block(spec, dtype, rngs), in_axes=(0,), out_axes=0)
            self.layers = create(rngs.split(spec.layers))
        else:
            self.layers = nnx.List([Block(spec, dtype, rngs) for _ in range(spec.layers)])
        self.norm = nnx.Param(jnp.ones(spec.width))
        if not spec.tied:
            self.lm_head = nnx.Param(init(rngs.params(), (spec.vocab, spec.width)))
        self.spec, self.dtype, self.stacked = spec, dtype, stacked

    def head_rows(self) -> jax.Array:
        """lm_head as rows [V, H]; the embedding where they are tied."""
        return self.embed_tokens[...] if self.spec.tied else self.lm_head[...]

    def logits(self, last: jax.Array) -> jax.Array:
        """float32 logits [..., V] of states that the final norm has seen."""
        return matmul(last, self.head_rows(), self.dtype, True)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embed_tokens[...][tokens].astype(jnp.float32)

    def final_norm(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm[...], self.spec.norm_eps)

    def forward(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array, taps: tuple[int, ...]):
        """Packed rows [B, T] -> (taps [B, T, A, H], last [B, T, H] after the final norm).

        A token sees the tokens of its own segment up to itself.
        """
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        allowed = causal & (segments[:, :, None] == segments[:, None, :])

        def mix(queries: jax.Array, keys: jax.Array, values: jax.Array, kept: None):
            return attend(queries, keys, values, allowed, self.dtype), kept

        x, tapped, _ = self._through_layers(self.embed(tokens), positions, mix, None, taps)
        return tapped, self.final_norm(x)

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: Cache, taps: tuple[int, ...]):
        """Tokens [B, T] at their positions, seen after what the cache holds -> (taps, last, cache).

        Keys and values are written at `positions`; a token sees every cached position up to its own. Positions that
        were written for tokens since rejected are seen by nobody before they are written anew.
        """
        rows = jnp.arange(tokens.shape[0])[:, None]
        length = jax.tree.leaves(cache)[0].shape[-3]
        allowed = jnp.arange(length) <= positions[:, :, None]

        def mix(queries: jax.Array, keys: jax.Array, values: jax.Array, kept: Cache):
            kept = Cache(
                kept.keys.at[rows, positions].set(keys.astype(kept.keys.dtype)),
                kept.values.at[rows, positions].set(values.astype(kept.values.dtype)),
            )
            return attend(queries, kept.keys, kept.values, allowed, self.dtype), kept

        x, tapped, cache = self._through_layers(self.embed(tokens), positions, mix, cache, taps)
        return tapped, self.final_norm(x), cache

    def empty_cache(self, rows: int, length: int, dtype: Any) -> Cache | tuple[Cache, ...]:
        """Room for `rows` sequences of up to `length` tokens: [rows, length, G, C] for each layer."""

        def one(*lead: int) -> Cache:
            shape = (*lead, rows, length, self.spec.kv_heads, self.spec.head_dim)
            return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        return one(self.spec.layers) if self.stacked else tuple(one() for _ in range(self.spec.layers))

    def _through_layers(self, x: jax.Array, positions: jax.Array, mix: Mix, cache: Any, taps: tuple[int, ...]):
        """-> (x after all layers, taps [B, T, A, H], what `mix` kept for each layer)."""
        if self.stacked:
            return self._scanned(x, positions, mix, cache, taps)
        tapped, kept = [x] if 0 in taps else [], []
        for i, block in enumerate(self.layers):
            x, layer_kept = block(x, positions, mix, None if cache is None else cache[i])
            kept.append(layer_kept)
            if i + 1 in taps:
                tapped.append(x)
        return x, jnp.stack(tapped, axis=2) if taps else None, tuple(kept)

    def _scanned(self, x: jax.Array, positions: jax.Array, mix: Mix, cache: Any, taps: tuple[int, ...]):
        graphdef, state = nnx.split(self.layers)
        # A place for each tap, and a last one that untapped layers overwrite.
        tapped = jnp.zeros((len(taps) + 1, *x.shape), x.dtype)
        if 0 in taps:
            tapped = tapped.at[0].set(x)
        places = [taps.index(i + 1) if i + 1 in taps else len(taps) for i in range(self.spec.layers)]

        def layer(carry, parts):
            x, tapped = carry
            state, place, kept = parts
            x, kept = nnx.merge(graphdef, state)(x, positions, mix, kept)
            return (x, jax.lax.dynamic_update_index_in_dim(tapped, x, place, 0)), kept

        (x, tapped), kept = jax.lax.scan(layer, (x, tapped), (state, jnp.array(places, jnp.int32), cache))
        return x, jnp.moveaxis(tapped[: len(taps)], 0, 2) if taps else None, kept
