"""The gated delta rule as a target's layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import DeltaInputs, Linear, delta_chunks, delta_steps, rms_norm, unit_norm
from jeagle.targets.model.build import Build
from jeagle.targets.model.spec import DeltaSpec
from jeagle.targets.model.view import Axes, Cache, View


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

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Logical axes of each array, a leading stack axis left out."""
        return ("rows", None, None, None), ("rows", None, "heads", None, None), ("rows",)


class GatedDelta(nnx.Module):
    """A short causal convolution, then the gated delta rule, then a gated norm."""

    def __init__(self, spec: DeltaSpec, width: int, eps: float, build: Build):
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, build.dtype, build.rngs, stored=build.stored)

        self.q_proj, self.k_proj = linear(width, keys), linear(width, keys)
        self.v_proj, self.z_proj = linear(width, values), linear(width, values)
        # Two numbers a head: too few to be worth narrowing.
        self.a_proj = Linear(width, spec.value_heads, build.dtype, build.rngs)
        self.b_proj = Linear(width, spec.value_heads, build.dtype, build.rngs)
        self.conv = nnx.Param(jnp.zeros((2 * keys + values, spec.kernel)))
        self.a_log, self.dt_bias = nnx.Param(jnp.zeros(spec.value_heads)), nnx.Param(jnp.ones(spec.value_heads))
        self.norm = nnx.Param(jnp.ones(spec.value_dim))
        self.o_proj = linear(values, width)
        self.spec, self.eps, self.dtype = spec, eps, build.dtype

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
            log_decay=jnp.where(real[..., None], inputs.log_decay, 0.0),
            beta=jnp.where(real[..., None], inputs.beta, 0.0),
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
