"""What a backend is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

MASKED = -1e30  # finite, so that exp of a masked score less the largest is 0 and never NaN


class Past(NamedTuple):
    """Queries and the step-0 keys that they see.

    A backend's forward pass gives (sum of weights times values [B, G, R, N, C], largest score, sum of weights
    [B, G, R, N, 1] each), weights relative to the largest score; its backward pass takes the gradient of the merged
    output, the merged logsumexp and <gradient, output>, and gives the gradients of queries, keys and values.

    Attributes:
      dtype: of the matrix products; sums are float32 or better.
      queries_BGRNC: scaled, R for each of the G key heads; float32 or better.
      keys_BGTC, values_BGTC: of every position.
      first_BN, last_BN: the first and last key of each slot.
    """

    dtype: Any
    queries_BGRNC: jax.Array
    keys_BGTC: jax.Array
    values_BGTC: jax.Array
    first_BN: jax.Array
    last_BN: jax.Array
