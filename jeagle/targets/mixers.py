"""What mixes tokens over time in a layer: attention, latent attention, the gated delta rule.

A mixer reads x [B, T, H] and a `View`; it returns its output, what it keeps for later tokens (None without a cache),
and the keys and values that it attended to, which Gemma's later layers may read again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import (
    DeltaInputs,
    Linear,
    Sight,
    attend,
    delta_chunks,
    delta_steps,
    depends_on_length,
    rms_norm,
    rotate_by,
    unit_norm,
    yarn_mscale,
)
from jeagle.targets.spec import AttentionSpec, DeltaSpec, LatentSpec


class Cache(NamedTuple):
    """Rotated keys and values of a layer, [B, S, G, C] each; of latent attention the latents [B, S, 1, .] and the
    shared rotated keys. Stacked layers have a leading axis."""

    keys: jax.Array
    values: jax.Array


class Recurrent(NamedTuple):
    """What a gated delta layer keeps, at each of the last R + 1 places between tokens: a row can go back up to R.

    Attributes:
      inputs: [B, R + 1, kernel - 1, D] what the convolution has still to see.
      states: [B, R + 1, V, K, E].
      first: [B] int32: how many tokens had been read at the first of these places.
    """

    inputs: jax.Array
    states: jax.Array
    first: jax.Array


class View(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      positions_BT: within each document. segments_BT: of packed rows; None with a cache.
      sight: who sees whom, over cached keys where there is a cache.
      lengths_BT: of each token's document, or None where no rope asks.
      count_B: with a cache: how many tokens of each row are real; the rest are padding.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    sight: Sight
    lengths_BT: jax.Array | None = None
    count_B: jax.Array | None = None


def _store(cache: jax.Array, fresh: jax.Array, positions_BT: jax.Array) -> jax.Array:
    rows = jnp.arange(positions_BT.shape[0])[:, None]
    return cache.at[rows, positions_BT].set(fresh.astype(cache.dtype))


class Attention(nnx.Module):
    """Grouped-query attention with every switch of `AttentionSpec`."""

    def __init__(self, spec: AttentionSpec, width: int, eps: float, dtype: Any, rngs: nnx.Rngs, stored: Any):
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, dtype, rngs, bias=bias, stored=stored)

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
        self.spec, self.eps, self.dtype = spec, eps, dtype

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
                pair = kept = Cache(
                    _store(kept.keys, pair.keys, view.positions_BT), _store(kept.values, pair.values, view.positions_BT)
                )
        mixed = attend(
            queries,
            pair.keys,
            pair.values,
            view.sight,
            self.dtype,
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


class LatentAttention(nnx.Module):
    """Multi-head latent attention; without a cache keys and values are made, with one queries go into the latent."""

    def __init__(self, spec: LatentSpec, width: int, eps: float, dtype: Any, rngs: nnx.Rngs, stored: Any):
        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, dtype, rngs, bias=bias, stored=stored)

        queries = spec.heads * (spec.nope_dim + spec.rope_dim)
        if spec.q_rank:
            self.q_a_proj = linear(width, spec.q_rank, spec.bias)
            self.q_a_norm = nnx.Param(jnp.ones(spec.q_rank))
            self.q_b_proj = linear(spec.q_rank, queries)
        else:
            self.q_proj = linear(width, queries)
        self.kv_a_proj = linear(width, spec.kv_rank + spec.rope_dim, spec.bias)
        self.kv_a_norm = nnx.Param(jnp.ones(spec.kv_rank))
        self.k_b_proj = Linear(spec.kv_rank, spec.heads * spec.nope_dim, dtype, rngs)
        self.v_b_proj = Linear(spec.kv_rank, spec.heads * spec.value_dim, dtype, rngs)
        self.o_proj = linear(spec.heads * spec.value_dim, width, spec.bias)
        self.spec, self.dtype = spec, dtype
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
            pair = kept = Cache(
                _store(kept.keys, pair.keys, view.positions_BT), _store(kept.values, pair.values, view.positions_BT)
            )
            mixed = self._absorbed(nope, turned, pair, view)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), kept, pair

    def _expanded(self, nope: jax.Array, turned: jax.Array, pair: Cache, view: View) -> jax.Array:
        heads = (*pair.keys.shape[:2], self.spec.heads, -1)
        keys = self.k_b_proj(pair.keys[:, :, 0]).reshape(heads)
        values = self.v_b_proj(pair.keys[:, :, 0]).reshape(heads)
        keys = jnp.concatenate([keys, jnp.broadcast_to(pair.values, (*keys.shape[:3], self.spec.rope_dim))], axis=-1)
        queries = jnp.concatenate([nope, turned], axis=-1)
        return attend(queries, keys, values, view.sight, self.dtype, scale=self._scale())

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


class GatedDelta(nnx.Module):
    """A short causal convolution, then the gated delta rule, then a gated norm."""

    def __init__(self, spec: DeltaSpec, width: int, eps: float, dtype: Any, rngs: nnx.Rngs, stored: Any):
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, dtype, rngs, stored=stored)

        self.q_proj, self.k_proj = linear(width, keys), linear(width, keys)
        self.v_proj, self.z_proj = linear(width, values), linear(width, values)
        # Two numbers a head: too few to be worth narrowing.
        self.a_proj = Linear(width, spec.value_heads, dtype, rngs)
        self.b_proj = Linear(width, spec.value_heads, dtype, rngs)
        self.conv = nnx.Param(jnp.zeros((2 * keys + values, spec.kernel)))
        self.a_log, self.dt_bias = nnx.Param(jnp.zeros(spec.value_heads)), nnx.Param(jnp.ones(spec.value_heads))
        self.norm = nnx.Param(jnp.ones(spec.value_dim))
        self.o_proj = linear(values, width)
        self.spec, self.eps, self.dtype = spec, eps, dtype

    def __call__(self, x: jax.Array, view: View, kept: Recurrent | None, shared: dict[str, Cache]):
        fresh = jnp.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        if kept is None:
            before = jnp.zeros((x.shape[0], self.spec.kernel - 1, fresh.shape[-1]), fresh.dtype)
            segments = jnp.ones(x.shape[:2], jnp.int32) if view.segments_BT is None else view.segments_BT
            mixed, _ = delta_chunks(self._inputs(x, self._convolved(before, fresh, segments)), segments)
        else:
            mixed, kept = self._onward(x, fresh, view, kept)
        z = self.z_proj(x).reshape(mixed.shape)
        mixed = rms_norm(mixed, self.norm[...], self.eps) * jax.nn.silu(z)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), kept, None

    def _onward(self, x: jax.Array, fresh: jax.Array, view: View, kept: Recurrent) -> tuple[jax.Array, Recurrent]:
        """From the kept place at which each row's first token stands."""
        batch, length = x.shape[:2]
        places = kept.states.shape[1]  # R + 1
        count = jnp.full(batch, length) if view.count_B is None else view.count_B
        start = view.positions_BT[:, 0]
        rows, place = jnp.arange(batch), jnp.clip(start - kept.first, 0, places - 1)
        before, state = kept.inputs[rows, place], kept.states[rows, place]
        real = jnp.arange(length) < count[:, None]
        inputs = self._inputs(x, self._convolved(before, fresh, jnp.ones((batch, length), jnp.int32)))
        # A token that is not real neither decays nor writes.
        inputs = inputs._replace(
            log_decay=jnp.where(real[..., None], inputs.log_decay, 0.0), beta=jnp.where(real[..., None], inputs.beta, 0.0)
        )
        if length < places:
            mixed, after = delta_steps(inputs, state)
            states = jnp.concatenate([jnp.repeat(state[:, None], places - length, axis=1), after], axis=1)
        else:
            mixed, last = delta_chunks(inputs, jnp.ones((batch, length), jnp.int32), state)
            states = jnp.repeat(last[:, None], places, axis=1)
        history = jnp.concatenate([before, fresh.astype(before.dtype)], axis=1)
        ends = count[:, None] - jnp.arange(places)[::-1]  # tokens of this call read at each place
        window = jnp.maximum(ends, 0)[..., None] + jnp.arange(self.spec.kernel - 1)
        return mixed, Recurrent(history[rows[:, None, None], window], states, start + count - places + 1)

    def _convolved(self, before: jax.Array, fresh: jax.Array, segments: jax.Array) -> jax.Array:
        """silu of each channel's weighted sum of its last `kernel` inputs, those of its own document."""
        kernel, length = self.spec.kernel, fresh.shape[1]
        history = jnp.concatenate([before.astype(fresh.dtype), fresh], axis=1)
        documents = jnp.pad(segments, ((0, 0), (kernel - 1, 0)), mode="edge")
        total = jnp.zeros_like(fresh)
        for back in range(kernel):
            places = slice(kernel - 1 - back, kernel - 1 - back + length)
            same = (documents[:, places] == segments)[..., None]
            total = total + jnp.where(same, history[:, places], 0.0) * self.conv[...][:, kernel - 1 - back]
        return jax.nn.silu(total)

    def _inputs(self, x: jax.Array, convolved: jax.Array) -> DeltaInputs:
        spec, lead = self.spec, x.shape[:2]
        keys = spec.key_heads * spec.key_dim
        queries, key, values = jnp.split(convolved, [keys, 2 * keys], axis=-1)
        shared = spec.value_heads // spec.key_heads

        def heads(x: jax.Array) -> jax.Array:
            return jnp.repeat(unit_norm(x.reshape(*lead, spec.key_heads, spec.key_dim)), shared, axis=2)

        log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(self.a_proj(x) + self.dt_bias[...])
        values = values.reshape(*lead, spec.value_heads, spec.value_dim)
        beta = jax.nn.sigmoid(self.b_proj(x))
        return DeltaInputs(heads(queries) * spec.key_dim**-0.5, heads(key), values, log_decay, beta)

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> Recurrent:
        spec = self.spec
        channels = 2 * spec.key_heads * spec.key_dim + spec.value_heads * spec.value_dim
        inputs = jnp.zeros((rows, rollback + 1, spec.kernel - 1, channels), dtype)
        states = jnp.zeros((rows, rollback + 1, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32)
        return Recurrent(inputs, states, jnp.full(rows, -rollback, jnp.int32))


MIXERS: dict[type, Any] = {AttentionSpec: Attention, LatentSpec: LatentAttention, DeltaSpec: GatedDelta}


def ropes_depend_on_length(spec: Any) -> bool:
    return any(getattr(b.mixer, "rope", None) is not None and depends_on_length(b.mixer.rope) for b in spec.blocks)
