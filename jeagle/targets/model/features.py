"""Batch -> Features: what a draft learns from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jeagle.align import select, take_rows
from jeagle.interfaces import Batch, Features, TopK
from jeagle.runtime.mesh import by_rows, logical_sharding, platform, row_axes
from jeagle.runtime.xla_workarounds import argmax_by_blocks, top_k_by_blocks
from jeagle.targets.model.decoder import Decoder

# Positions whose logits over the whole vocabulary exist at a time on a device. Accelerators read the whole lm_head for
# each chunk, which only many positions make worth it.
CPU_CHUNK, ACCELERATOR_CHUNK = 256, 1024


def features(
    model: Decoder, batch: Batch, aux_layers: tuple[int, ...], wanted_BT: jax.Array, width: int, top_k: int = 0
) -> Features:
    """The features of packed rows; what needs logits only where `wanted_BT` holds, at most `width` positions a row.

    Args:
      top_k: entries of each distribution that teach; 0 leaves the final states to it.
    """
    aux_BTAH, last_BTH = model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, aux_layers)
    chosen = select(wanted_BT, width)
    rows = jnp.arange(wanted_BT.shape[0])[:, None]

    def spread(found_BN: jax.Array) -> jax.Array:
        live_BN = chosen.live_BN.reshape(*chosen.live_BN.shape, *(1,) * (found_BN.ndim - 2))
        empty_BT = jnp.zeros((*wanted_BT.shape, *found_BN.shape[2:]), found_BN.dtype)
        return empty_BT.at[rows, chosen.positions_BN].set(jnp.where(live_BN, found_BN, 0))

    said = jax.tree.map(spread, distributions(model, take_rows(last_BTH, chosen.positions_BN), top_k))
    return Features(aux_BTAH, last_BTH if said.top is None else said.top, said.greedy, said.lse)


class Said(NamedTuple):
    """What is kept of distributions at N positions of each row: argmax, logsumexp, and the top entries if asked for."""

    greedy: jax.Array
    lse: jax.Array
    top: TopK | None


def distributions(model: Decoder, last_BNH: jax.Array, top_k: int = 0) -> Said:
    """The target's distributions over its whole vocabulary after the final states given; `top_k` as in `features`."""
    if not top_k:
        return Said(*greedy_and_lse(model, last_BNH), None)

    def top(logits: jax.Array) -> tuple[jax.Array, TopK]:
        lse = jax.nn.logsumexp(logits, axis=-1)
        values, ids = top_k_by_blocks(logits, top_k)
        log_probs = values - lse[..., None]
        rest = jnp.maximum(1.0 - jnp.exp(log_probs).sum(axis=-1), 0.0)
        return lse, TopK(ids.astype(jnp.int32), log_probs, rest)

    greedy_BN, (lse_BN, kept) = over_vocabulary(model, last_BNH, top)
    return Said(greedy_BN, lse_BN, kept)


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


def over_vocabulary(model: Decoder, last_BNH: jax.Array, figure: Callable[[jax.Array], Any]) -> tuple[jax.Array, Any]:
    """argmax and a figure (or a tree of some) of each position's logits, a chunk of positions at a time.

    Without a mesh anything with a method `logits` will do for a model.
    """
    batch, width, hidden = last_BNH.shape
    mesh = getattr(model, "mesh", None)
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in row_axes(mesh, batch))
    at_once = parts * (CPU_CHUNK if platform(mesh) == "cpu" else ACCELERATOR_CHUNK)
    chunk = -(-width // min(width, max(1, -(-batch * width // at_once))))  # of each row: rows stay where they are
    chunks = -(-width // chunk)
    padded = jnp.pad(last_BNH, ((0, 0), (0, chunks * chunk - width), (0, 0)))
    to_logits = model.logits if mesh is None else functools.partial(model.logits, head=_gathered(model, mesh))

    def one(last: jax.Array) -> tuple[jax.Array, Any]:
        logits = to_logits(by_rows(last, mesh))
        return argmax_by_blocks(logits).astype(jnp.int32), figure(logits)

    def joined(metrics: jax.Array) -> jax.Array:
        return jnp.moveaxis(metrics, 0, 1).reshape(batch, chunks * chunk, *metrics.shape[3:])[:, :width]

    return jax.tree.map(joined, jax.lax.map(one, jnp.moveaxis(padded.reshape(batch, chunks, chunk, hidden), 1, 0)))


def _gathered(model: Decoder, mesh: Mesh) -> jax.Array:
    """The lm_head's rows [V, H], whole on each device but for the vocabulary's split, once for all chunks."""
    rows = model.head_rows()
    if mesh.size == 1:
        return rows
    place = NamedSharding(mesh, logical_sharding(("vocab", None), rows.shape, mesh))
    return jax.lax.with_sharding_constraint(rows.astype(model.dtype), place)
