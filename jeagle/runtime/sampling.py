"""How a token is chosen from logits: the most likely one, or one that is sampled with temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jeagle.errors import UserError
from jeagle.runtime.xla_workarounds import argmax_by_blocks


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its distribution.

    Attributes:
      temperature: logits are divided by it; 0 = the most likely token, whatever the other fields say.
      top_p: only the fewest most likely tokens whose probabilities, at this temperature, sum to at least `top_p`;
        1 = all.
      top_k: only the `top_k` most likely tokens, applied before `top_p`; 0 = all.

    Raises:
      UserError: for a value that is out of range.

    Source: nucleus sampling, Holtzman et al. (arXiv 1904.09751), for top_p.
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


GREEDY = Sampling()


def sample_tokens(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Chooses one token for each row, int32; the randomness of row b comes from keys_B[b] alone."""
    return argmax_by_blocks(sampling_scores(logits_BV, keys_B, sampling)).astype(jnp.int32)


def sampling_scores(
    logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling
) -> Float[Array, "B V"]:
    """Scores whose largest one is the sampled token; at temperature 0 the logits themselves.

    Gumbel noise is added to the logit of each token id, so that logits which differ by rounding give the same token
    unless two tokens were nearly equal.
    """
    if sampling.temperature == 0:
        return logits_BV
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:], jnp.float32))(keys_B)
    return log_weights(logits_BV, sampling) + noise_BV


def log_weights(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits at the temperature, up to a constant in each row; -inf for tokens that are not eligible."""
    scaled_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / sampling.temperature
    return jnp.where(eligible_tokens(scaled_BV, sampling.top_p, sampling.top_k), scaled_BV, -jnp.inf)


def eligible_tokens(logits_BV: Float[Array, "B V"], top_p: float, top_k: int) -> Bool[Array, "B V"]:
    """Whether a token is among those that `top_k` and then `top_p` leave; of equal logits the lower id comes first."""
    rows, vocab = logits_BV.shape
    top_k = min(top_k or vocab, vocab)
    if top_k == vocab and top_p == 1:
        return jnp.ones((rows, vocab), bool)
    ranked_BK, ids_BK = jax.lax.top_k(logits_BV, top_k)
    probabilities_BK = jax.nn.softmax(ranked_BK, axis=-1)
    before_BK = jnp.cumsum(probabilities_BK, axis=-1) - probabilities_BK
    within_BK = before_BK < top_p if top_p < 1 else jnp.ones_like(before_BK, bool)
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], ids_BK].set(within_BK)


def token_keys(key: Key[Array, ""], numbers_B: UInt[Array, " B"], counts_BN: Int[Array, "B N"]) -> Key[Array, "B N"]:
    """The randomness of the token that follows `counts_BN` tokens of an answer, by the prompt's number."""
    row_keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(row_keys, counts_BN)
