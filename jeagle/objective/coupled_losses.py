"""Losses of a slot that depend on others: on its step's mean acceptance, or on the earlier steps of its trajectory.

Both are functions of how likely each slot is to be accepted. A first pass finds that, without gradients; from it
follows what the gradient of each slot's own cross entropy and overlap is to be multiplied with, and a second pass, the
only one with gradients, multiplies. Values and gradients are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jeagle.objective.losses import WHOLE, Mixture, Terms
from jeagle.runtime.mesh import summed_over


class Split(NamedTuple):
    """A loss as a sum of losses of single slots.

    Attributes:
      terms: weighted names of such losses.
      factors: of each term, what it is multiplied with at each slot [K, B, N]; None is 1.
      rest_K: what is missing of each step's loss, a number without gradient.
    """

    terms: Terms
    factors: tuple[jax.Array | None, ...]
    rest_K: jax.Array


def needs_first_pass(terms: Terms) -> bool:
    return any(name in WHOLE for _, name in terms)


def split(
    terms: Terms,
    accepted_KBN: jax.Array,
    trained_KBN: jax.Array,
    scale_KBN: jax.Array,
    decay: float,
    mixture: Mixture,
    over: tuple[str, ...] = (),
) -> Split:
    """The terms as losses of single slots.

    lk_step: w soft_ce + (1 - w)(1 - a), a the mean acceptance of the step's slots and w the mixture's share there; the
    first part is normalised as the objective says, the second is a mean. Source: LK losses (arXiv 2602.23881), as
    SpecForge 0.2.0 has it ("lambda").

    length: minus the chance that all steps up to this one are accepted; summed over the steps, 1 less the expected
    acceptance length. Source: Leviathan et al. (arXiv 2211.17192), with each step's own acceptance.

    Args:
      accepted_KBN: overlap of draft and target at each slot, from the first pass.
      scale_KBN: what a slot's loss is multiplied with before the decay.
      decay: of the objective: a slot of step j stands in the chances of all steps k >= j, which weigh decay**k.
      over: mesh axes over which a surrounding `shard_map` splits the rows.
    """
    steps = len(trained_KBN)
    out: list[tuple[tuple[float, str], jax.Array | None]] = []
    rest_K = jnp.zeros(steps, scale_KBN.dtype)
    for weight, name in terms:
        if name == "lk_step":
            share, mean = _step_factors(accepted_KBN, trained_KBN, scale_KBN, mixture, over)
            out += [((weight, "soft_ce"), share), ((weight, "tv"), mean)]
        elif name == "length":
            factor, missing_K = _length_factors(accepted_KBN, trained_KBN, scale_KBN, decay)
            out.append(((weight, "tv"), factor))
            rest_K = rest_K + weight * missing_K
        else:
            out.append(((weight, name), None))
    return Split(tuple(term for term, _ in out), tuple(factor for _, factor in out), rest_K)


def _step_factors(accepted, trained, scale, mixture: Mixture, over) -> tuple[jax.Array, jax.Array]:
    count_K = jnp.maximum(summed_over(trained.sum(axis=(1, 2)), over), 1)
    mean_K = summed_over(jnp.where(trained, accepted, 0.0).sum(axis=(1, 2)), over) / count_K
    share = jnp.broadcast_to(mixture.share(mean_K)[:, None, None], scale.shape)
    return share, (1.0 - share) / (count_K[:, None, None] * jnp.where(scale == 0, 1.0, scale))


def _length_factors(accepted, trained, scale, decay: float) -> tuple[jax.Array, jax.Array]:
    weight = scale * decay ** jnp.arange(len(scale), dtype=scale.dtype)[:, None, None]

    def by_step(accepted: jax.Array) -> jax.Array:
        reached = jnp.cumprod(jnp.where(trained, accepted, 0.0), axis=0)
        return -jnp.where(trained, reached, 0.0)

    towards = jax.grad(lambda accepted: jnp.sum(weight * by_step(accepted)))(accepted)
    factor = jnp.where(weight == 0, 0.0, -towards / jnp.where(weight == 0, 1.0, weight))
    found = jnp.where(trained, factor * (1.0 - accepted), 0.0)
    return factor, jnp.sum(scale * (by_step(accepted) - found), axis=(1, 2))
