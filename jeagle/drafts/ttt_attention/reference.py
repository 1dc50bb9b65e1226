"""The obvious form, to test every other against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def reference(
    queries_BNQC: jax.Array,
    keys_BTGC: jax.Array,
    values_BTGC: jax.Array,
    allowed_BNT: jax.Array,
    own_keys_JBNGC: jax.Array,
    own_values_JBNGC: jax.Array,
    own_allowed_J: jax.Array,
) -> jax.Array:
    """One softmax over the step-0 keys that `allowed_BNT` lets a slot see and its own keys of later steps.

    Args:
      queries_BNQC: rotated queries of N slots.
      keys_BTGC, values_BTGC: rotated keys and values of step 0, of every position.
      allowed_BNT: which step-0 keys a slot sees (causal, same document, window).
      own_keys_JBNGC, own_values_JBNGC: the slot's own keys and values of steps 1..J.
      own_allowed_J: which of those steps have happened.

    Returns:
      [B, N, Q, C].

    Source: EAGLE-3 (arXiv 2503.01840), figure 6: the attention mask of training-time test.
    """
    repeats = queries_BNQC.shape[2] // keys_BTGC.shape[2]
    keys, values, own_keys, own_values = (
        jnp.repeat(x, repeats, axis=-2) for x in (keys_BTGC, values_BTGC, own_keys_JBNGC, own_values_JBNGC)
    )
    past = jnp.einsum("bnqc,btqc->bnqt", queries_BNQC, keys)
    own = jnp.einsum("bnqc,jbnqc->bnqj", queries_BNQC, own_keys)
    allowed = jnp.concatenate(
        [jnp.broadcast_to(allowed_BNT[:, :, None], past.shape), jnp.broadcast_to(own_allowed_J, own.shape)], axis=-1
    )
    scores = jnp.concatenate([past, own], axis=-1) / math.sqrt(queries_BNQC.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    length = keys.shape[1]
    mixed = jnp.einsum("bnqt,btqc->bnqc", weights[..., :length], values)
    return mixed + jnp.einsum("bnqj,jbnqc->bnqc", weights[..., length:], own_values)
