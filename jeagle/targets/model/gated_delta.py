"""The gated delta rule, linear attention whose state forgets and corrects itself, as a target's layer.

    S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T          o_t = S_t^T q_t

Source: Gated Delta Networks (arXiv 2412.06464); the chunked form is the WY representation of its section 3.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import Linear, rms_norm
from jeagle.targets.model.attention import Axes, BuildOptions, KVCache, TokenContext
from jeagle.targets.model.spec import DeltaSpec

CHUNK = 64  # tokens


class RecurrentCache(NamedTuple):
    """Cache of a gated delta layer: snapshots after each of the last R + 1 tokens, so that a row can roll back up to R.

    Attributes:
      inputs: [B, R + 1, kernel - 1, D] the last inputs, which the convolution still needs.
      states: [B, R + 1, V, K, E] the state of the rule.
      first: [B] int32 number of tokens that had been read at the first snapshot.
    """

    inputs: jax.Array
    states: jax.Array
    first: jax.Array

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Logical axes of each array, without the leading axis of a stack."""
        return ("rows", None, None, None), ("rows", None, "heads", None, None), ("rows",)


class GatedDelta(nnx.Module):
    """A short causal convolution, then the gated delta rule, then a gated norm; Qwen3-Next's linear attention."""

    def __init__(self, spec: DeltaSpec, width: int, eps: float, build: BuildOptions):
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
        self.q_proj, self.k_proj = build.linear(width, keys), build.linear(width, keys)
        self.v_proj, self.z_proj = build.linear(width, values), build.linear(width, values)
        # Two numbers for each head are too few to be worth narrowing.
        self.a_proj = Linear(width, spec.value_heads, build.dtype, build.rngs)
        self.b_proj = Linear(width, spec.value_heads, build.dtype, build.rngs)
        self.conv = nnx.Param(jnp.zeros((2 * keys + values, spec.kernel)))
        self.a_log, self.dt_bias = nnx.Param(jnp.zeros(spec.value_heads)), nnx.Param(jnp.ones(spec.value_heads))
        self.norm = nnx.Param(jnp.ones(spec.value_dim))
        self.o_proj = build.linear(values, width)
        self.spec, self.eps, self.dtype = spec, eps, build.dtype

    def __call__(self, x: jax.Array, context: TokenContext, cache: RecurrentCache | None, shared: dict[str, KVCache]):
        """Mixes x [B, T, H] over time; see `mixer` for arguments and results."""
        fresh = jnp.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        if cache is None:
            before = jnp.zeros((x.shape[0], self.spec.kernel - 1, fresh.shape[-1]), fresh.dtype)
            inputs = self._inputs(x, self._convolved(before, fresh, context.segments_BT))
            mixed, _ = delta_chunks(inputs, context.segments_BT)
        else:
            mixed, cache = self._continued(x, fresh, context, cache)
        z = self.z_proj(x).reshape(mixed.shape)
        mixed = rms_norm(mixed, self.norm[...], self.eps) * jax.nn.silu(z)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), cache, None

    def _continued(
        self, x: jax.Array, fresh: jax.Array, context: TokenContext, cache: RecurrentCache
    ) -> tuple[jax.Array, RecurrentCache]:
        """Goes on from the snapshot that each row's first token follows -> (outputs, new cache)."""
        batch, length = x.shape[:2]
        snapshots = cache.states.shape[1]  # R + 1
        count = jnp.full(batch, length) if context.count_B is None else context.count_B
        start = context.positions_BT[:, 0]
        rows, snapshot = jnp.arange(batch), jnp.clip(start - cache.first, 0, snapshots - 1)
        before, state = cache.inputs[rows, snapshot], cache.states[rows, snapshot]
        real = jnp.arange(length) < count[:, None]
        inputs = self._inputs(x, self._convolved(before, fresh, jnp.ones((batch, length), jnp.int32)))
        # A padding token neither decays nor writes.
        inputs = inputs._replace(
            log_decay=jnp.where(real[..., None], inputs.log_decay, 0.0),
            beta=jnp.where(real[..., None], inputs.beta, 0.0),
        )
        if length < snapshots:
            mixed, after = delta_steps(inputs, state)
            states = jnp.concatenate([jnp.repeat(state[:, None], snapshots - length, axis=1), after], axis=1)
        else:
            mixed, last = delta_chunks(inputs, jnp.ones((batch, length), jnp.int32), state)
            states = jnp.repeat(last[:, None], snapshots, axis=1)
        history = jnp.concatenate([before, fresh.astype(before.dtype)], axis=1)
        ends = count[:, None] - jnp.arange(snapshots)[::-1]  # tokens of this call that each snapshot has read
        window = jnp.maximum(ends, 0)[..., None] + jnp.arange(self.spec.kernel - 1)
        return mixed, RecurrentCache(history[rows[:, None, None], window], states, start + count - snapshots + 1)

    def _convolved(self, before: jax.Array, fresh: jax.Array, segments: jax.Array) -> jax.Array:
        """silu of each channel's weighted sum of its last `kernel` inputs of the same document, [B, T, D]."""
        kernel, length = self.spec.kernel, fresh.shape[1]
        history = jnp.concatenate([before.astype(fresh.dtype), fresh], axis=1)
        documents = jnp.pad(segments, ((0, 0), (kernel - 1, 0)), mode="edge")
        total = jnp.zeros_like(fresh)
        for back in range(kernel):
            window = slice(kernel - 1 - back, kernel - 1 - back + length)
            same = (documents[:, window] == segments)[..., None]
            total = total + jnp.where(same, history[:, window], 0.0) * self.conv[...][:, kernel - 1 - back]
        return jax.nn.silu(total)

    def _inputs(self, x: jax.Array, convolved: jax.Array) -> DeltaInputs:
        spec, lead = self.spec, x.shape[:2]
        keys = spec.key_heads * spec.key_dim
        queries, key, values = jnp.split(convolved, [keys, 2 * keys], axis=-1)
        shared = spec.value_heads // spec.key_heads

        def heads(x: jax.Array) -> jax.Array:
            """Keys or queries of each value head, divided by their norm in float32 or better."""
            x = x.reshape(*lead, spec.key_heads, spec.key_dim).astype(jnp.promote_types(x.dtype, jnp.float32))
            return jnp.repeat(x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6), shared, axis=2)

        log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(self.a_proj(x) + self.dt_bias[...])
        values = values.reshape(*lead, spec.value_heads, spec.value_dim)
        beta = jax.nn.sigmoid(self.b_proj(x))
        return DeltaInputs(heads(queries) * spec.key_dim**-0.5, heads(key), values, log_decay, beta)

    def empty(self, rows: int, length: int, dtype: Any, rollback: int) -> RecurrentCache:
        """An empty cache for `rows` sequences that may roll back by up to `rollback` tokens."""
        spec = self.spec
        channels = 2 * spec.key_heads * spec.key_dim + spec.value_heads * spec.value_dim
        inputs = jnp.zeros((rows, rollback + 1, spec.kernel - 1, channels), dtype)
        states = jnp.zeros((rows, rollback + 1, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32)
        return RecurrentCache(inputs, states, jnp.full(rows, -rollback, jnp.int32))


class DeltaInputs(NamedTuple):
    """Inputs of the rule for each token and value head.

    Attributes:
      queries, keys: [B, T, V, K]. values: [B, T, V, E].
      log_decay: log a <= 0, [B, T, V]. beta: b, [B, T, V].
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    log_decay: jax.Array
    beta: jax.Array


def delta_steps(inputs: DeltaInputs, state_BVKE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Applies the rule token by token, which is fast for a few tokens.

    Args:
      state_BVKE: the state before the first token.

    Returns:
      (outputs [B, T, V, E], the state after each token [B, T, V, K, E]).
    """

    def one(state: jax.Array, token: DeltaInputs) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        state = state * jnp.exp(token.log_decay)[..., None, None]
        recalled = jnp.einsum("bvke,bvk->bve", state, token.keys)
        change = (token.values - recalled) * token.beta[..., None]
        state = state + token.keys[..., None] * change[..., None, :]
        return state, (jnp.einsum("bvke,bvk->bve", state, token.queries), state)

    by_time = DeltaInputs(*(jnp.moveaxis(x, 1, 0) for x in inputs))
    _, (outputs, states) = jax.lax.scan(one, state_BVKE, by_time)
    return jnp.moveaxis(outputs, 0, 1), jnp.moveaxis(states, 0, 1)


def delta_chunks(
    inputs: DeltaInputs, segments_BT: jax.Array, state_BVKE: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Applies the rule in chunks of `CHUNK` tokens.

    Args:
      segments_BT: document of each token. Each document starts from an empty state.
      state_BVKE: the state that the first document of each row starts from instead; None = an empty one.

    Returns:
      (outputs [B, T, V, E], the state after the last token [B, V, K, E]).
    """
    batch, length, heads, key_dim = inputs.keys.shape
    padding = -length % CHUNK
    chunks = (length + padding) // CHUNK
    # Padding belongs to the last document and neither decays nor writes, so that the state stays as it is.
    segments = jnp.pad(segments_BT, ((0, 0), (0, padding)), mode="edge")
    padded = DeltaInputs(*(jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in inputs))

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, chunks, CHUNK, *x.shape[2:]), 1, 0)

    empty = jnp.zeros((batch, heads, key_dim, inputs.values.shape[-1]), jnp.float32)
    start = empty if state_BVKE is None else state_BVKE

    def one(carry: tuple[jax.Array, jax.Array], parts: tuple[DeltaInputs, jax.Array]):
        state, last = carry
        outputs, state = _chunk(parts[0], parts[1], state, last)
        return (state, parts[1][:, -1]), outputs

    carry, outputs = jax.lax.scan(one, (start, segments[:, 0]), (jax.tree.map(split, padded), split(segments)))
    joined = jnp.moveaxis(outputs, 0, 1).reshape(batch, chunks * CHUNK, heads, -1)
    return joined[:, :length], carry[0]


def _chunk(
    inputs: DeltaInputs, segments_BC: jax.Array, state: jax.Array, last_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Applies the rule to one chunk -> (outputs [B, C, V, E], the state after it); `last_B` is the state's document."""
    queries, keys, values, log_decay, beta = (jnp.moveaxis(x, 2, 1) for x in inputs)  # [B, V, C, ...]
    total = jnp.cumsum(log_decay, axis=-1)
    same = (segments_BC[:, :, None] == segments_BC[:, None, :])[:, None]
    since = jnp.exp(jnp.where(same, total[..., :, None] - total[..., None, :], -jnp.inf))
    # The carried state belongs to the last document of the chunk before; the other documents start from an empty one.
    from_start = jnp.where((segments_BC == last_B[:, None])[:, None], jnp.exp(total), 0.0)
    lower = jnp.tril(jnp.ones(since.shape[-2:], bool))
    overlap = jnp.einsum("bvik,bvjk->bvij", keys, keys)
    system = jnp.where(jnp.tril(lower, -1), overlap * jnp.where(lower, since, 0.0), 0.0) * beta[..., None]
    system = system + jnp.eye(system.shape[-1])
    recalled = jnp.einsum("bvik,bvke->bvie", keys, state) * from_start[..., None]
    change = jax.lax.linalg.triangular_solve(
        system, (values - recalled) * beta[..., None], left_side=True, lower=True, unit_diagonal=True
    )
    attention = jnp.einsum("bvik,bvjk->bvij", queries, keys) * jnp.where(lower, since, 0.0)
    outputs = jnp.einsum("bvik,bvke->bvie", queries, state) * from_start[..., None]
    outputs = outputs + jnp.einsum("bvij,bvje->bvie", attention, change)
    state = state * from_start[..., -1, None, None]
    state = state + jnp.einsum("bvjk,bvje->bvke", keys * since[..., -1, :, None], change)
    return jnp.moveaxis(outputs, 1, 2), state
