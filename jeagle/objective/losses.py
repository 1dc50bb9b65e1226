"""Losses between the target's distribution and the draft's, one slot at a time.

Every loss takes the draft's logits [..., D] over the draft vocabulary and the teacher's probabilities, and returns a
number per slot [...], in the logits' type.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jeagle.errors import UserError


class TeacherProbs(NamedTuple):
    """The target's distribution after some positions.

    Attributes:
      probs: over the draft vocabulary, renormalised to sum to 1: [..., D].
      full_probs: the same entries of the distribution over the whole vocabulary [..., D]; they sum to at most 1.
    """

    probs: Float[Array, "*rows D"]
    full_probs: Float[Array, "*rows D"]


class KLShare(NamedTuple):
    """The share of KL in an LK loss at acceptance a: scale * exp(-decay * a).

    Source: LK losses (arXiv 2602.23881); speculators 0.9.0 has 1 and 3, SpecForge 0.2.0 leaves both to the user.
    """

    scale: float = 1.0
    decay: float = 3.0

    def at(self, accepted: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.scale * jnp.exp(-self.decay * jax.lax.stop_gradient(accepted))


SPECULATORS_SHARE = KLShare()
Loss = Callable[[jax.Array, TeacherProbs], jax.Array]
Terms = tuple[tuple[float, str], ...]
"""Weights and names of the losses that are summed."""


# Every loss takes its softmax from these few lines, so that the compiler computes one softmax and not several.
def _exp_sum(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(The largest logit, exp(logits - largest), their sum)."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exps = jnp.exp(logits - largest)
    return largest, exps, jnp.sum(exps, axis=-1, keepdims=True)


def _log_sum(logits: jax.Array) -> jax.Array:
    """logsumexp over the last axis, which is kept with size 1."""
    largest, _, total = _exp_sum(logits)
    return largest + jnp.log(total)


def _expected(logits: jax.Array, probs: jax.Array) -> jax.Array:
    """<p, logits>; a matrix product where several rows of logits share one p, which saves a pass over the logits."""
    if probs.ndim != logits.ndim or probs.shape[-2] != 1:
        return jnp.sum(probs * logits, axis=-1)
    return jnp.einsum("...kd,...d->...k", logits, probs[..., 0, :], precision=jax.lax.Precision.HIGHEST)


def _negative_entropy(probs: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)


def soft_ce(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """-<p, log q>, at least the teacher's entropy. Source: EAGLE-3 (arXiv 2503.01840); SpecForge."""
    return _log_sum(logits)[..., 0] - _expected(logits, teacher.probs)


def hard_ce(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """-log q at the teacher's argmax within the draft vocabulary, at least 0. Source: speculators' "ce"."""
    label = jnp.argmax(teacher.probs, axis=-1)[..., None]
    chosen = jnp.take_along_axis(logits, jnp.broadcast_to(label, (*logits.shape[:-1], 1)), axis=-1)[..., 0]
    return _log_sum(logits)[..., 0] - chosen


def kl(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """KL(p || q), at least 0; its gradient is that of soft_ce."""
    return soft_ce(logits, teacher) + _negative_entropy(teacher.probs)


def reverse_kl(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """KL(q || p), at least 0."""
    log_q = logits - _log_sum(logits)
    return jnp.sum(jnp.exp(log_q) * (log_q - jnp.log(jnp.maximum(teacher.probs, 1e-38))), axis=-1)


def js(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """Jensen-Shannon divergence, 0 to log 2. Source: Lin, Divergence measures based on the Shannon entropy (1991)."""
    log_q = logits - _log_sum(logits)
    log_middle = jnp.log(jnp.maximum(0.5 * (teacher.probs + jnp.exp(log_q)), 1e-38))
    from_p = _negative_entropy(teacher.probs) - jnp.sum(teacher.probs * log_middle, axis=-1)
    from_q = jnp.sum(jnp.exp(log_q) * (log_q - log_middle), axis=-1)
    return 0.5 * (from_p + from_q)


def overlap(logits: Float[Array, "*rows D"], probs: Float[Array, "*teachers D"]) -> Float[Array, "..."]:
    """sum_v min(p_v, q_v), 0 to 1: the probability that a sampled draft token is accepted.

    Source: Leviathan et al., Fast inference from transformers via speculative decoding (arXiv 2211.17192).
    """
    _, exps, total = _exp_sum(logits)
    return jnp.sum(jnp.minimum(probs * total, exps), axis=-1) / total[..., 0]


def tv(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """Total variation: 1 - overlap, 0 to 1."""
    return 1.0 - overlap(logits, teacher.full_probs)


def nla(logits: Float[Array, "*rows D"], teacher: TeacherProbs) -> Float[Array, "..."]:
    """Negative log acceptance: -log overlap, at least 0. Source: LK losses (arXiv 2602.23881)."""
    return -jnp.log(jnp.maximum(overlap(logits, teacher.full_probs), 1e-5))


def lk(
    logits: Float[Array, "*rows D"], teacher: TeacherProbs, share: KLShare = SPECULATORS_SHARE
) -> Float[Array, "..."]:
    """w KL + (1 - w)(1 - overlap), w being the share at the slot's own overlap. Source: speculators 0.9.0."""
    accepted = overlap(logits, teacher.full_probs)
    w = share.at(accepted)
    return w * kl(logits, teacher) + (1.0 - w) * (1.0 - accepted)


LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (soft_ce, hard_ce, kl, reverse_kl, js, tv, nla, lk)}
COUPLED_LOSSES = ("lk_step", "length")
"""Losses of a slot that depend on other slots too: see `coupled_losses`."""
ACCEPTANCE_LOSSES = ("tv", "nla", "lk", *COUPLED_LOSSES)
"""Losses of the probability that a token is accepted."""
ALIASES = {
    "kl_div": "kl",
    "rkl": "reverse_kl",
    "jsd": "js",
    "ce": "hard_ce",
    "lk_hybrid": "lk",
    "alpha": "nla",
    "lambda": "lk_step",
}
"""Names of the same losses in speculators 0.9.0 (--loss-fn) and, the last two, in SpecForge 0.2.0 (lk_loss_type)."""


def parse_loss(text: str) -> Terms:
    """Reads a weighted sum: "0.1*ce+0.9*tv" -> ((0.1, "hard_ce"), (0.9, "tv")); names may be ALIASES.

    Raises:
      UserError: for an unknown name, or a weight that is not a number.
    """
    terms = []
    for part in text.replace(" ", "").split("+"):
        weight, star, name = part.rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            raise UserError(f"The loss {text!r} has the weight {weight!r}, which is not a number.") from None
        canonical = ALIASES.get(name, name)
        if canonical not in LOSSES and canonical not in COUPLED_LOSSES:
            known = ", ".join((*LOSSES, *COUPLED_LOSSES))
            raise UserError(
                f"The loss {text!r} contains {name!r}, which is unknown. The losses are {known}; the names of "
                f"speculators and SpecForge are accepted too: {', '.join(ALIASES)}."
            )
        terms.append((value, canonical))
    return tuple(terms)


def weighted_sum(terms: Terms, share: KLShare = SPECULATORS_SHARE, factors: tuple[jax.Array | None, ...] = ()) -> Loss:
    """The weighted sum of named losses as one loss; each term is multiplied by its factor [...], None meaning 1."""

    def loss(logits: jax.Array, teacher: TeacherProbs) -> jax.Array:
        parts = []
        for (weight, name), factor in itertools.zip_longest(terms, factors):
            value = lk(logits, teacher, share) if name == "lk" else LOSSES[name](logits, teacher)
            parts.append(weight * value if factor is None else weight * factor * value)
        return sum(parts[1:], start=parts[0])

    return loss
