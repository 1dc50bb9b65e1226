"""Training-time test: K steps in which a draft reads its own states, at the live slots only."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle import align
from jeagle.align import Selected, take_rows
from jeagle.drafts import ttt_attention
from jeagle.drafts.eagle3 import Eagle3
from jeagle.joints import Batch, Predictions, Tables


class Past(NamedTuple):
    """What the later layers of a step need beside the slot's own state."""

    keys_BTGC: jax.Array
    values_BTGC: jax.Array


def unroll(
    graphdef: Any,
    state: Any,
    batch: Batch,
    taps_BTAH: jax.Array,
    tables: Tables,
    slots: Selected,
    counts_KBT: jax.Array,
    *,
    cross_documents: bool = False,
) -> Predictions:
    """All K steps of TTT -> what the objective needs.

    Step 0 makes keys and values at every position, since later slots attend to them; everything else is made at the N
    live slots. Positions rotate by t + k, keys are kept rotated, and gradients flow through all steps.

    Args:
      graphdef, state: of an `Eagle3`.
      slots: the N slots of each row that count at some step, from `layers.select`.
      counts_KBT: from `align.counting_slots`.
      cross_documents: as in `align.read_positions`.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    draft = nnx.merge(graphdef, state)
    steps = counts_KBT.shape[0]
    reads_KBT = align.read_positions(batch.segments_BT, steps, cross_documents=cross_documents)
    reads_KBN = jax.vmap(lambda reads: take_rows(reads, slots.positions_BN))(reads_KBT)
    counts_KBN = jax.vmap(lambda counts: take_rows(counts, slots.positions_BN))(counts_KBT) & slots.live_BN
    fused_BTW = draft.fuse(taps_BTAH)
    if draft.spec.layers == 1:
        context = _context(draft, batch, fused_BTW, tables, reads_KBT[0], slots)
    else:
        context = _deep_context(draft, batch, fused_BTW, tables, reads_KBT[0], slots)

    tokens_KBN = jax.vmap(lambda reads: _read_tokens(batch, reads))(reads_KBN)
    positions_BN = take_rows(batch.positions_BT, slots.positions_BN)

    # Looked up before the scan: within it, XLA's CPU backend would convert the whole table to float32 first.
    embedded_KBNW = tables.embed_VW[tokens_KBN]

    def step(carry, parts):
        k, embedded_BNW = parts
        return _step(nnx.merge(graphdef, state), carry, k, embedded_BNW, positions_BN, context)

    own = _empty_own(draft, steps, slots.positions_BN.shape)
    carry = (take_rows(fused_BTW, slots.positions_BN), own)
    _, hidden_KBNW = jax.lax.scan(step, carry, (jnp.arange(steps), embedded_KBNW))
    return Predictions(hidden_KBNW, reads_KBN, counts_KBN)


class Context(NamedTuple):
    """Of every layer: the step-0 keys and values; and which of them a slot sees."""

    past: tuple[Past, ...]
    allowed_BNT: jax.Array


def _embed(tables: Tables, tokens: jax.Array) -> jax.Array:
    return tables.embed_VW[tokens].astype(jnp.float32)


def _read_tokens(batch: Batch, reads_BT: jax.Array) -> jax.Array:
    """The tokens at these positions; 0 where a slot reads none (position T)."""
    padded = jnp.pad(batch.tokens_BT, ((0, 0), (0, 1)))
    return take_rows(padded, jnp.minimum(reads_BT, batch.tokens_BT.shape[1]))


def _visible(batch: Batch, positions_BN: jax.Array, window: int) -> jax.Array:
    """Step-0 keys at or before the slot, of its document, within the window: [B, N, T]."""
    here_T = jnp.arange(batch.tokens_BT.shape[1])
    segments_BN = take_rows(batch.segments_BT, positions_BN)
    allowed = (here_T <= positions_BN[..., None]) & (segments_BN[..., None] == batch.segments_BT[:, None])
    return allowed & (here_T > positions_BN[..., None] - window) if window else allowed


def _context(draft: Eagle3, batch: Batch, fused_BTW, tables: Tables, reads_BT, slots: Selected) -> Context:
    layer = draft.layers[0]
    read_BTX, _ = layer.inputs(_embed(tables, _read_tokens(batch, reads_BT)), fused_BTW)
    past = Past(*layer.self_attn.keys_values(read_BTX, batch.positions_BT))
    return Context((past,), _visible(batch, slots.positions_BN, draft.spec.sliding_window))


def _deep_context(draft: Eagle3, batch: Batch, fused_BTW, tables: Tables, reads_BT, slots: Selected) -> Context:
    """With several layers the deeper keys of step 0 need the shallower layers at every position."""
    embedded = _embed(tables, _read_tokens(batch, reads_BT))
    everywhere = jnp.broadcast_to(jnp.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)
    allowed = _visible(batch, everywhere, draft.spec.sliding_window)
    hidden, past = fused_BTW, []
    for layer in draft.layers:
        read, residual = layer.inputs(embedded, hidden)
        keys, values = layer.self_attn.keys_values(read, batch.positions_BT)
        past.append(Past(keys, values))
        queries = layer.self_attn.queries(read, batch.positions_BT)
        nothing = jnp.zeros((0, *keys.shape), keys.dtype)
        mixed = ttt_attention.chunked(
            queries, keys, values, allowed, nothing, nothing, jnp.zeros(0, bool), dtype=draft.dtype
        )
        hidden = layer.finish(residual, mixed)
    return Context(tuple(past), take_rows(allowed, slots.positions_BN))


def _empty_own(draft: Eagle3, steps: int, slots: tuple[int, ...]) -> tuple[Past, ...]:
    """Room for the slots' own keys and values of steps 1..K-1, of every layer."""
    shape = (steps - 1, *slots, draft.spec.kv_heads, draft.spec.head_dim)
    kind = jnp.promote_types(draft.dtype, jnp.float32)
    return tuple(Past(jnp.zeros(shape, kind), jnp.zeros(shape, kind)) for _ in draft.layers)


def _step(draft: Eagle3, carry, k: jax.Array, embedded_BNW, positions_BN, context: Context):
    hidden, own = carry
    embedded = embedded_BNW.astype(jnp.float32)
    happened_J = jnp.arange(own[0].keys_BTGC.shape[0]) < k
    kept = []
    for layer, past, mine in zip(draft.layers, context.past, own, strict=True):
        read, residual = layer.inputs(embedded, hidden)
        mine = _keep_own(layer, mine, read, positions_BN + k, k)
        queries = layer.self_attn.queries(read, positions_BN + k)
        mixed = ttt_attention.chunked(
            queries, past.keys_BTGC, past.values_BTGC, context.allowed_BNT, *mine, happened_J, dtype=draft.dtype
        )
        hidden = layer.finish(residual, mixed)
        kept.append(mine)
    for_head, state = draft.finish(hidden)
    return (state, tuple(kept)), for_head


def _keep_own(layer, mine: Past, read: jax.Array, positions: jax.Array, k: jax.Array) -> Past:
    """Puts step k's own keys and values at place k - 1; step 0's lie in the context already."""
    if mine.keys_BTGC.shape[0] == 0:
        return mine
    fresh = layer.self_attn.keys_values(read, positions)
    place = jnp.maximum(k - 1, 0)  # step 0 writes where step 1 will write again
    return Past(
        *(jax.lax.dynamic_update_index_in_dim(room, new, place, 0) for room, new in zip(mine, fresh, strict=True))
    )
