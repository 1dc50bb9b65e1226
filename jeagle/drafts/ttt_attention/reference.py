"""The obvious form, to test every other against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def reference(
    queries_BQNC: jax.Array,
    keys_BGTC: jax.Array,
    values_BGTC: jax.Array,
    first_BN: jax.Array,
    last_BN: jax.Array,
    own_keys_JBGNC: jax.Array,
    own_values_JBGNC: jax.Array,
    own_allowed_J: jax.Array,
) -> jax.Array:
    """One softmax over the step-0 keys `first` to `last` of a slot and its own keys of later steps.

    Args:
      queries_BQNC: rotated queries of N slots.
      keys_BGTC, values_BGTC: rotated keys and values of step 0, of every position.
      first_BN, last_BN: the first and last position whose step-0 key a slot sees (its document's or window's first, and
        its own).
      own_keys_JBGNC, own_values_JBGNC: the slot's own keys and values of steps 1..J.
      own_allowed_J: which of those steps have happened.

    Returns:
      [B, Q, N, C].

    Source: EAGLE-3 (arXiv 2503.01840), figure 6: the attention mask of training-time test.
    """
    repeats = queries_BQNC.shape[1] // keys_BGTC.shape[1]
    keys, values, own_keys, own_values = (
        jnp.repeat(x, repeats, axis=-3) for x in (keys_BGTC, values_BGTC, own_keys_JBGNC, own_values_JBGNC)
    )
    here_T = jnp.arange(keys.shape[2])
    seen_BNT = (here_T >= first_BN[..., None]) & (here_T <= last_BN[..., None])
    past = jnp.where(seen_BNT[:, None], jnp.einsum("bqnc,bqtc->bqnt", queries_BQNC, keys), -jnp.inf)
    own = jnp.where(own_allowed_J, jnp.einsum("bqnc,jbqnc->bqnj", queries_BQNC, own_keys), -jnp.inf)
    scores = jnp.concatenate([past, own], axis=-1) / math.sqrt(queries_BQNC.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bqnt,bqtc->bqnc", weights[..., : len(here_T)], values)
    return mixed + jnp.einsum("bqnj,jbqnc->bqnc", weights[..., len(here_T) :], own_values)
