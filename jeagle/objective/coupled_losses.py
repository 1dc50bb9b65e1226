"""Losses of a slot that depend on other slots: on its step's mean acceptance, or on earlier steps of its trajectory.

Both are functions of every slot's acceptance. A first pass without gradients computes it; from it follow factors for
the gradients of each slot's own cross entropy and overlap, and a second pass, the only one with gradients, multiplies
by them. Values and gradients are exact.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jeagle.objective.losses import KLShare, Terms
from jeagle.runtime.mesh import summed_over


def split_by_slot(
    terms: Terms,
    accepted_KBN: Float[Array, "K B N"],
    trained_KBN: Bool[Array, "K B N"],
    scale_KBN: Float[Array, "K B N"],
    decay: float,
    share: KLShare,
    over: tuple[str, ...] = (),
) -> tuple[Terms, tuple[jax.Array | None, ...], Float[Array, " K"]]:
    """The terms as losses of single slots.

    lk_step: w soft_ce + (1 - w)(1 - a), where a is the mean acceptance of the step's slots and w the share of KL at a.
    The first part is normalised as the objective says, the second is a mean. Source: LK losses (arXiv 2602.23881), as
    "lambda" of SpecForge 0.2.0 computes it.

    length: minus the probability that all steps up to this one are accepted. Its sum over the steps is 1 minus the
    expected acceptance length. Source: Leviathan et al. (arXiv 2211.17192), with each step's own acceptance.

    Args:
      accepted_KBN: overlap of draft and target at each slot, from the first pass.
      trained_KBN: the slots that carry loss.
      scale_KBN: what a slot's loss is multiplied by before the decay.
      decay: of the objective; a slot of step j is part of the products of all steps k >= j, which weigh decay**k.
      share: of KL in lk_step.
      over: mesh axes over which a surrounding `shard_map` splits the rows.

    Returns:
      (Weights and names of losses of single slots; what each of them is multiplied by at each slot [K, B, N], None
      being 1; what is missing of each step's loss, which has no gradient).
    """
    split: list[tuple[tuple[float, str], jax.Array | None]] = []
    rest_K = jnp.zeros(len(trained_KBN), scale_KBN.dtype)
    for weight, name in terms:
        if name == "lk_step":
            kl_factor, tv_factor = _step_factors(accepted_KBN, trained_KBN, scale_KBN, share, over)
            split += [((weight, "soft_ce"), kl_factor), ((weight, "tv"), tv_factor)]
        elif name == "length":
            factor, missing_K = _length_factors(accepted_KBN, trained_KBN, scale_KBN, decay)
            split.append(((weight, "tv"), factor))
            rest_K = rest_K + weight * missing_K
        else:
            split.append(((weight, name), None))
    return tuple(term for term, _ in split), tuple(factor for _, factor in split), rest_K


def _step_factors(accepted, trained, scale, share: KLShare, over) -> tuple[jax.Array, jax.Array]:
    count_K = jnp.maximum(summed_over(trained.sum(axis=(1, 2)), over), 1)
    mean_K = summed_over(jnp.where(trained, accepted, 0.0).sum(axis=(1, 2)), over) / count_K
    w = jnp.broadcast_to(share.at(mean_K)[:, None, None], scale.shape)
    return w, (1.0 - w) / (count_K[:, None, None] * jnp.where(scale == 0, 1.0, scale))


def _length_factors(accepted, trained, scale, decay: float) -> tuple[jax.Array, jax.Array]:
    weight = scale * decay ** jnp.arange(len(scale), dtype=scale.dtype)[:, None, None]

    def by_step(accepted: jax.Array) -> jax.Array:
        all_accepted = jnp.cumprod(jnp.where(trained, accepted, 0.0), axis=0)
        return -jnp.where(trained, all_accepted, 0.0)

    gradient = jax.grad(lambda accepted: jnp.sum(weight * by_step(accepted)))(accepted)
    factor = jnp.where(weight == 0, 0.0, -gradient / jnp.where(weight == 0, 1.0, weight))
    slot_losses = jnp.where(trained, factor * (1.0 - accepted), 0.0)
    return factor, jnp.sum(scale * (by_step(accepted) - slot_losses), axis=(1, 2))
