"""Speculative sampling of a chain whose tokens the draft has sampled, and the randomness of its decisions."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jeagle.decoding.tree import Accepted, Tree
from jeagle.runtime.sampling import Sampling, log_weights


def judge_by_rejection(
    chain: Tree,
    logits_BNV: Float[Array, "B N V"],
    draft_logits_BKD: Float[Array, "B K D"],
    draft_ids_D: Int[Array, " D"],
    keys_BN: Key[Array, "B N"],
    sampling: Sampling,
) -> tuple[Accepted, Int[Array, "B N"]]:
    """Speculative sampling of a chain whose tokens were sampled from the draft's distribution.

    Returns:
      (what is accepted, the committed tokens: the accepted ones and the one that is sampled after them).

    Source: Leviathan et al. (arXiv 2211.17192), algorithm 1.
    """
    batch, nodes, vocab = logits_BNV.shape

    def probabilities(logits: jax.Array) -> jax.Array:
        flat = log_weights(logits.reshape(-1, logits.shape[-1]), sampling)
        return jax.nn.softmax(flat, axis=-1).reshape(logits.shape)

    p_BNV = probabilities(logits_BNV)
    q_BKV = jnp.zeros((batch, nodes - 1, vocab)).at[:, :, draft_ids_D].set(probabilities(draft_logits_BKD))
    drafted_BK = chain.tokens_BN[:, 1:]
    p_BK, q_BK = (jnp.take_along_axis(of, drafted_BK[:, :, None], axis=2)[:, :, 0] for of in (p_BNV[:, :-1], q_BKV))
    draws_BK = jax.vmap(jax.vmap(jax.random.uniform))(for_purpose(keys_BN[:, :-1], "accept"))
    accepted_BK = jnp.cumprod(draws_BK * q_BK < p_BK, axis=1)
    count_B = accepted_BK.sum(axis=1)
    # After the whole chain nothing was drafted, so that the next token is sampled from p itself.
    rest_BV = jnp.maximum(at_index(count_B, p_BNV) - at_index(count_B, jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0)))), 0.0)
    next_B = jax.vmap(jax.random.categorical)(
        for_purpose(at_index(count_B, keys_BN)[:, None], "next")[:, 0], jnp.log(rest_BV)
    )
    places = jnp.arange(nodes)
    committed = jnp.where(places == count_B[:, None], next_B[:, None], jnp.pad(drafted_BK, ((0, 0), (0, 1))))
    return Accepted(count_B, jnp.broadcast_to(places, committed.shape)), committed


def for_purpose(keys: Key[Array, "B N"], purpose: Literal["draft", "accept", "next"]) -> Key[Array, "B N"]:
    number = ("draft", "accept", "next").index(purpose) + 1
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys)


def at_index(index_B: jax.Array, of_BT: jax.Array) -> jax.Array:
    """of_BT[b, index_B[b]] for each row b."""
    return of_BT[jnp.arange(index_B.shape[0]), index_B]
