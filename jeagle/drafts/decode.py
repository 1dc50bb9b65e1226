"""The draft as it runs at serving: a KV cache, one state after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.drafts.eagle3 import Eagle3, Stream
from jeagle.interfaces import Tables
from jeagle.layers import AttentionMask, masked_attention


class Cache(NamedTuple):
    """One layer's keys and values of all slots so far."""

    keys_BTGC: jax.Array
    values_BTGC: jax.Array


def empty_cache(draft: Eagle3, rows: int, length: int) -> tuple[Cache, ...]:
    """Room for `length` slots of `rows` sequences, for each layer."""
    shape = (rows, length, draft.spec.kv_heads, draft.spec.head_dim)
    kind = jnp.promote_types(draft.dtype, jnp.float32)
    return tuple(Cache(jnp.zeros(shape, kind), jnp.zeros(shape, kind)) for _ in draft.layers)


def advance(
    draft: Eagle3,
    tables: Tables,
    hidden_BTW: jax.Array,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: tuple[Cache, ...],
) -> tuple[jax.Array, jax.Array, tuple[Cache, ...]]:
    """Slots at `positions_BT` read a state and a token -> (what lm_head reads, the states to go on from, cache).

    A state is `draft.fuse(taps)` where the target has been, and the draft's own last state where it has not. Keys are
    written at the positions; a slot sees every cached slot up to its own, so slots written for rejected tokens are
    seen by nobody before they are written anew.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.1; positions as in vLLM and SGLang (slot t rotates by t).
    """
    rows = jnp.arange(tokens_BT.shape[0])[:, None]
    length = cache[0].keys_BTGC.shape[1]
    mask = AttentionMask(positions_BT, jnp.broadcast_to(jnp.arange(length), (tokens_BT.shape[0], length)))
    embedded = tables.embed_VW[tokens_BT].astype(jnp.float32)
    hidden, kept = hidden_BTW, []
    for layer, past in zip(draft.layers, cache, strict=True):
        read, residual = layer.inputs(embedded, Stream.of(hidden, draft.dtype))
        fresh = layer.self_attn.keys_values(read, positions_BT)
        past = Cache(*(room.at[rows, positions_BT].set(new) for room, new in zip(past, fresh, strict=True)))
        queries = layer.self_attn.queries(read, positions_BT)
        mixed = masked_attention(queries, *past, mask, draft.dtype, window=draft.spec.sliding_window)
        hidden = layer.finish(residual, mixed)
        kept.append(past)
    for_head, state = draft.finish(Stream.of(hidden, draft.dtype))
    return for_head, state, tuple(kept)


def choose(draft: Eagle3, tables: Tables, for_head: Any) -> jax.Array:
    """The draft's greedy token as a target id."""
    return tables.draft_to_target_D[jnp.argmax(draft.logits(for_head), axis=-1)]
