"""The gated delta rule: linear attention whose state forgets and corrects itself.

    S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T          o_t = S_t^T q_t

Source: Gated Delta Networks (arXiv 2412.06464); in chunks by the WY form of section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64


class DeltaInputs(NamedTuple):
    """Per token and value head: queries, keys [B, T, V, K]; values [B, T, V, E]; log a <= 0 and b, [B, T, V]."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    log_decay: jax.Array
    beta: jax.Array


def delta_steps(inputs: DeltaInputs, state_BVKE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token by token -> (outputs [B, T, V, E], the state after each token [B, T, V, K, E]): for a few tokens."""

    def one(state: jax.Array, token: DeltaInputs) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        state = state * jnp.exp(token.log_decay)[..., None, None]
        held = jnp.einsum("bvke,bvk->bve", state, token.keys)
        change = (token.values - held) * token.beta[..., None]
        state = state + token.keys[..., None] * change[..., None, :]
        return state, (jnp.einsum("bvke,bvk->bve", state, token.queries), state)

    by_time = DeltaInputs(*(jnp.moveaxis(x, 1, 0) for x in inputs))
    _, (outputs, states) = jax.lax.scan(one, state_BVKE, by_time)
    return jnp.moveaxis(outputs, 0, 1), jnp.moveaxis(states, 0, 1)


def delta_chunks(
    inputs: DeltaInputs, segments_BT: jax.Array, state_BVKE: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """In chunks -> (outputs [B, T, V, E], the state after the last token).

    A document (`segments_BT` says which a token belongs to) starts from an empty state; the first one of a row from
    `state_BVKE`, if given.
    """
    batch, length, heads, key_dim = inputs.keys.shape
    padding = -length % CHUNK
    chunks = (length + padding) // CHUNK
    # Padding repeats the last document, neither decays nor writes, and so leaves the state as it is.
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
    queries, keys, values, log_decay, beta = (jnp.moveaxis(x, 2, 1) for x in inputs)  # [B, V, C, ...]
    total = jnp.cumsum(log_decay, axis=-1)
    same = (segments_BC[:, :, None] == segments_BC[:, None, :])[:, None]
    since = jnp.exp(jnp.where(same, total[..., :, None] - total[..., None, :], -jnp.inf))
    # A document's own first decay acts on an empty state; those of the one before it must not be counted.
    from_start = jnp.where((segments_BC == last_B[:, None])[:, None], jnp.exp(total), 0.0)
    lower = jnp.tril(jnp.ones(since.shape[-2:], bool))
    overlap = jnp.einsum("bvik,bvjk->bvij", keys, keys)
    system = jnp.where(jnp.tril(lower, -1), overlap * jnp.where(lower, since, 0.0), 0.0) * beta[..., None]
    system = system + jnp.eye(system.shape[-1])
    held = jnp.einsum("bvik,bvke->bvie", keys, state) * from_start[..., None]
    change = jax.lax.linalg.triangular_solve(
        system, (values - held) * beta[..., None], left_side=True, lower=True, unit_diagonal=True
    )
    attention = jnp.einsum("bvik,bvjk->bvij", queries, keys) * jnp.where(lower, since, 0.0)
    outputs = jnp.einsum("bvik,bvke->bvie", queries, state) * from_start[..., None]
    outputs = outputs + jnp.einsum("bvij,bvje->bvie", attention, change)
    state = state * from_start[..., -1, None, None]
    state = state + jnp.einsum("bvjk,bvje->bvke", keys * since[..., -1, :, None], change)
    return jnp.moveaxis(outputs, 1, 2), state
