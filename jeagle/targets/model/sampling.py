"""From logits to a token: the most likely one, or one drawn by chance."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jeagle.errors import UserError
from jeagle.runtime.xla_workarounds import argmax_by_blocks


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
      temperature: logits are divided by it; 0 = the most likely token, whatever the rest says.
      top_p: only the fewest most likely tokens whose probabilities, at this temperature, together reach it; 1 = all.
      top_k: only so many of the most likely tokens, cut before `top_p` counts; 0 = all.

    Raises:
      UserError: for values that no choice can be made with.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"The temperature is {self.temperature}; it must be 0 (the most likely token) or above.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a share, above 0 and up to 1.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it is a number of tokens, or 0 for all.")


def choose(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token for each row, int32 [B]; row b's chance comes from keys_B[b] alone.

    Noise belongs to token ids (Gumbel-max), not to ranks: logits that differ by rounding give the same token unless it
    was a close call.
    """
    if sampling.temperature == 0:
        return argmax_by_blocks(logits_BV).astype(jnp.int32)
    best_B1 = logits_BV.max(axis=-1, keepdims=True)
    heated_BV = (logits_BV - best_B1) / sampling.temperature
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:], jnp.float32))(keys_B)
    allowed_BV = eligible(heated_BV, sampling.top_p, sampling.top_k)
    return argmax_by_blocks(jnp.where(allowed_BV, heated_BV + noise_BV, -jnp.inf)).astype(jnp.int32)


def eligible(logits_BV: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """bool [B, V]: the tokens that `top_k`, then `top_p` leave; of equal logits the lower id comes first.

    Source: nucleus sampling, Holtzman et al. (arXiv 1904.09751).
    """
    rows, vocab = logits_BV.shape
    top_k = min(top_k or vocab, vocab)
    if top_k == vocab and top_p == 1:
        return jnp.ones((rows, vocab), bool)
    ranked_BK, ids_BK = jax.lax.top_k(logits_BV, top_k)
    shares_BK = jax.nn.softmax(ranked_BK, axis=-1)
    before_BK = jnp.cumsum(shares_BK, axis=-1) - shares_BK
    within_BK = before_BK < top_p if top_p < 1 else jnp.ones_like(before_BK, bool)
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], ids_BK].set(within_BK)
