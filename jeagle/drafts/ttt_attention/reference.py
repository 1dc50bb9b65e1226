"""What the op computes, in its plain form; and the part of it that a backend computes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a key that is not attended to: finite, so that exp(MASKED - largest) is 0 and never NaN."""


class Step0Inputs(NamedTuple):
    """Queries and the step-0 keys that they attend to: what a backend gets.

    A backend's `forward(inputs)` returns the sum of weights times values [B, G, R, N, C], the largest score and the sum
    of weights [B, G, R, N, 1] each, the weights being exp(score - largest score). Its `backward(inputs, dout, lse,
    dout_dot_out)` gets the gradient of the merged output, the merged logsumexp and <dout, output>, and returns the
    gradients of queries, keys and values. `divides(slots, length)` tells whether so many slots and positions suit it.

    Attributes:
      dtype: type of the matrix products; sums are float32 or better.
      queries_BGRNC: scaled by 1 / sqrt(C), R heads for each of the G key heads; float32 or better.
      keys_BGTC, values_BGTC: of every position.
      first_BN, last_BN: the first and the last position that each slot attends to.
    """

    dtype: Any
    queries_BGRNC: Float[Array, "B G R N C"]
    keys_BGTC: Float[Array, "B G T C"]
    values_BGTC: Float[Array, "B G T C"]
    first_BN: Int[Array, "B N"]
    last_BN: Int[Array, "B N"]


def contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contracts axis `axes[0]` of matrix a with `axes[1]` of matrix b, summed in float32: a product in a kernel."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def reference(
    queries_BQNC: Float[Array, "B Q N C"],
    keys_BGTC: Float[Array, "B G T C"],
    values_BGTC: Float[Array, "B G T C"],
    first_BN: Int[Array, "B N"],
    last_BN: Int[Array, "B N"],
    own_keys_JBGNC: Float[Array, "J B G N C"],
    own_values_JBGNC: Float[Array, "J B G N C"],
    own_allowed_J: Bool[Array, " J"],
) -> Float[Array, "B Q N C"]:
    """One softmax over the step-0 keys `first` to `last` of a slot and its own keys of later steps.

    Args:
      queries_BQNC: rotated queries of N slots.
      keys_BGTC, values_BGTC: rotated keys, and values, of step 0 at every position.
      first_BN, last_BN: the first and the last position whose step-0 key a slot attends to: the first of its document
        or window, and its own.
      own_keys_JBGNC, own_values_JBGNC: the slot's own keys and values of steps 1..J.
      own_allowed_J: which of those steps a slot attends to.

    Source: EAGLE-3 (arXiv 2503.01840), figure 6: the attention mask of training-time test.
    """
    repeats = queries_BQNC.shape[1] // keys_BGTC.shape[1]
    keys, values, own_keys, own_values = (
        jnp.repeat(x, repeats, axis=-3) for x in (keys_BGTC, values_BGTC, own_keys_JBGNC, own_values_JBGNC)
    )
    here_T = jnp.arange(keys.shape[2])
    visible_BNT = (here_T >= first_BN[..., None]) & (here_T <= last_BN[..., None])
    step_0 = jnp.where(visible_BNT[:, None], jnp.einsum("bqnc,bqtc->bqnt", queries_BQNC, keys), -jnp.inf)
    own = jnp.where(own_allowed_J, jnp.einsum("bqnc,jbqnc->bqnj", queries_BQNC, own_keys), -jnp.inf)
    scores = jnp.concatenate([step_0, own], axis=-1) / math.sqrt(queries_BQNC.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("bqnt,bqtc->bqnc", weights[..., : len(here_T)], values)
    return mixed + jnp.einsum("bqnj,jbqnc->bqnc", weights[..., len(here_T) :], own_values)
