"""The draft as it runs at serving: with a KV cache, from one hidden state to the next."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jeagle.drafts.eagle3 import Eagle3, ResidualStream
from jeagle.interfaces import Tables
from jeagle.layers import AttentionMask, masked_attention


class DraftCache(NamedTuple):
    """One layer's keys and values of S slots."""

    keys_BSGC: Float[Array, "B S G C"]
    values_BSGC: Float[Array, "B S G C"]


def empty_cache(draft: Eagle3, rows: int, length: int) -> tuple[DraftCache, ...]:
    """A cache of `length` slots for each of `rows` sequences, one entry per layer."""
    shape = (rows, length, draft.spec.kv_heads, draft.spec.head_dim)
    dtype = jnp.promote_types(draft.dtype, jnp.float32)
    return tuple(DraftCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in draft.layers)


def advance(
    draft: Eagle3,
    tables: Tables,
    hidden_BTW: Float[Array, "B T W"],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: tuple[DraftCache, ...],
) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"], tuple[DraftCache, ...]]:
    """The slots at `positions_BT` each read a hidden state and a token.

    Keys and values are written at the positions. A slot attends to the cached slots up to its own position, so that
    slots written for rejected tokens are overwritten before any slot attends to them.

    Args:
      hidden_BTW: `draft.fuse(aux)` where the target has read the position; else the draft's own previous state.
      tokens_BT: the token after each position.
      positions_BT: slot t has position t, by which it rotates, as in vLLM and SGLang.

    Returns:
      (what lm_head reads, the hidden states to continue from, the cache with the new slots).

    Source: EAGLE-3 (arXiv 2503.01840), section 3.1.
    """
    rows = jnp.arange(tokens_BT.shape[0])[:, None]
    length = cache[0].keys_BSGC.shape[1]
    mask = AttentionMask(positions_BT, jnp.broadcast_to(jnp.arange(length), (tokens_BT.shape[0], length)))
    embedded = tables.embed_VW[tokens_BT].astype(jnp.float32)
    stream, new_cache = ResidualStream.of(hidden_BTW, draft.dtype), []
    for layer, past, window in zip(draft.layers, cache, draft.spec.windows, strict=True):
        read, residual = layer.inputs(embedded, stream)
        new = layer.self_attn.keys_values(read, positions_BT)
        past = DraftCache(*(cached.at[rows, positions_BT].set(x) for cached, x in zip(past, new, strict=True)))
        queries = layer.self_attn.queries(read, positions_BT)
        mixed = masked_attention(queries, *past, mask, draft.dtype, window=window)
        stream = ResidualStream.of(layer.finish(residual, mixed), draft.dtype)
        new_cache.append(past)
    for_head, next_hidden = draft.finish(stream)
    return for_head, next_hidden, tuple(new_cache)


def greedy_token(draft: Eagle3, tables: Tables, for_head: Float[Array, "*rows W"]) -> Int[Array, "*rows"]:
    """The draft's most likely token for what lm_head reads, as an id of the target's vocabulary."""
    return tables.draft_to_target_D[jnp.argmax(draft.logits(for_head), axis=-1)]
