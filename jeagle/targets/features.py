"""Batch -> Features: what a draft learns from."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jeagle.align import select, take_rows
from jeagle.joints import Batch, Features
from jeagle.runtime.numerics import first_largest
from jeagle.targets.decoder import Decoder

VOCABULARY_CHUNK = 256  # positions whose logits over the whole vocabulary exist at a time


def features(model: Decoder, batch: Batch, taps: tuple[int, ...], wanted_BT: jax.Array, width: int) -> Features:
    """The features of packed rows; greedy and lse only where `wanted_BT` holds, at most `width` positions a row."""
    taps_BTAH, last_BTH = model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, taps)
    chosen = select(wanted_BT, width)
    greedy_BN, lse_BN = greedy_and_lse(model, take_rows(last_BTH, chosen.positions_BN))
    rows = jnp.arange(wanted_BT.shape[0])[:, None]
    empty = jnp.zeros(wanted_BT.shape, jnp.float32)
    lse_BT = empty.at[rows, chosen.positions_BN].set(jnp.where(chosen.live_BN, lse_BN, 0.0))
    greedy_BT = empty.astype(jnp.int32).at[rows, chosen.positions_BN].set(jnp.where(chosen.live_BN, greedy_BN, 0))
    return Features(taps_BTAH, last_BTH, greedy_BT, lse_BT)


def greedy_and_lse(model: Decoder, last_BNH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """argmax (int32) and logsumexp (float32) of the logits, [B, N] each."""
    return over_vocabulary(model, last_BNH, lambda logits: jax.nn.logsumexp(logits, axis=-1))


def greedy_and_gap(model: Decoder, last_BNH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """argmax (int32) of the logits and how far it lies above the next best (float32), [B, N] each."""

    def gap(logits: jax.Array) -> jax.Array:
        best = logits.max(axis=-1, keepdims=True)
        is_best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[..., None]
        return best[..., 0] - jnp.where(is_best, -jnp.inf, logits).max(axis=-1)

    return over_vocabulary(model, last_BNH, gap)


def over_vocabulary(
    model: Decoder, last_BNH: jax.Array, figure: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """argmax and a figure of each position's logits, a chunk of positions at a time."""
    batch, width, hidden = last_BNH.shape
    total = batch * width
    chunks = -(-total // VOCABULARY_CHUNK)
    chunk = -(-total // chunks)  # even ones, so that no last one is made of padding
    padded = jnp.pad(last_BNH.reshape(total, hidden), ((0, chunks * chunk - total), (0, 0)))

    def one(last: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(last)
        return first_largest(logits).astype(jnp.int32), figure(logits)

    greedy, figures = jax.lax.map(one, padded.reshape(chunks, chunk, hidden))
    return greedy.reshape(-1)[:total].reshape(batch, width), figures.reshape(-1)[:total].reshape(batch, width)
