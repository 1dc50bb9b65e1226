"""Divergences between what the target says and what the draft says, a row of logits at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.errors import UserError


class Teacher(NamedTuple):
    """The target's distribution at some positions.

    Attributes:
      probs: over the draft vocabulary, renormalised to 1: [..., D].
      full_probs: the same entries of the distribution over the whole vocabulary: they sum to at most 1.
    """

    probs: jax.Array
    full_probs: jax.Array


class Mixture(NamedTuple):
    """How much of an LK loss is KL at an acceptance a: scale * exp(-decay * a).

    Source: LK losses (arXiv 2602.23881); speculators 0.9.0 has 1 and 3, SpecForge 0.2.0 leaves both to the user.
    """

    scale: float = 1.0
    decay: float = 3.0

    def share(self, accepted: jax.Array) -> jax.Array:
        return self.scale * jnp.exp(-self.decay * jax.lax.stop_gradient(accepted))


PLAIN_MIXTURE = Mixture()
Loss = Callable[[jax.Array, Teacher], jax.Array]
Terms = tuple[tuple[float, str], ...]


# Every loss takes its softmax from these few lines, so that the compiler sees one and not several.
def _exp_sum(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(largest, exp(logits - largest), their sum)."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exps = jnp.exp(logits - largest)
    return largest, exps, jnp.sum(exps, axis=-1, keepdims=True)


def _log_sum(logits: jax.Array) -> jax.Array:
    """logsumexp over the last axis, which stays with size 1."""
    largest, _, total = _exp_sum(logits)
    return largest + jnp.log(total)


def _log_probs(logits: jax.Array) -> jax.Array:
    return logits - _log_sum(logits)


def _expected(logits: jax.Array, probs: jax.Array) -> jax.Array:
    """<p, logits>; a product where several rows of logits share a p, which spares a pass over them."""
    if probs.ndim != logits.ndim or probs.shape[-2] != 1:
        return jnp.sum(probs * logits, axis=-1)
    return jnp.einsum("...kd,...d->...k", logits, probs[..., 0, :], precision=jax.lax.Precision.HIGHEST)


def _entropy_term(probs: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), axis=-1)


def soft_ce(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """-<p, log q>, at least the teacher's entropy. Source: EAGLE-3 (arXiv 2503.01840); SpecForge."""
    return _log_sum(logits)[..., 0] - _expected(logits, teacher.probs)


def hard_ce(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """-log q at the teacher's argmax within the draft vocabulary, at least 0. (speculators' "ce".)"""
    label = jnp.argmax(teacher.probs, axis=-1)[..., None]
    chosen = jnp.take_along_axis(logits, jnp.broadcast_to(label, (*logits.shape[:-1], 1)), axis=-1)[..., 0]
    return _log_sum(logits)[..., 0] - chosen


def kl(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """KL(p || q), at least 0; its gradient is that of soft_ce."""
    return soft_ce(logits, teacher) + _entropy_term(teacher.probs)


def reverse_kl(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """KL(q || p), at least 0."""
    log_q = _log_probs(logits)
    return jnp.sum(jnp.exp(log_q) * (log_q - jnp.log(jnp.maximum(teacher.probs, 1e-38))), axis=-1)


def js(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """Jensen-Shannon divergence, 0 to log 2. Source: Lin, Divergence measures based on the Shannon entropy (1991)."""
    log_q = _log_probs(logits)
    middle = jnp.log(jnp.maximum(0.5 * (teacher.probs + jnp.exp(log_q)), 1e-38))
    from_p = _entropy_term(teacher.probs) - jnp.sum(teacher.probs * middle, axis=-1)
    from_q = jnp.sum(jnp.exp(log_q) * (log_q - middle), axis=-1)
    return 0.5 * (from_p + from_q)


def overlap(logits: jax.Array, probs: jax.Array) -> jax.Array:
    """sum_v min(p_v, q_v), 0 to 1: the chance that a sampled draft token is accepted.

    Source: Leviathan et al., Fast inference from transformers via speculative decoding (arXiv 2211.17192).
    """
    _, exps, total = _exp_sum(logits)
    return jnp.sum(jnp.minimum(probs * total, exps), axis=-1) / total[..., 0]


def tv(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """1 - overlap, 0 to 1: total variation."""
    return 1.0 - overlap(logits, teacher.full_probs)


def nla(logits: jax.Array, teacher: Teacher) -> jax.Array:
    """-log overlap, at least 0. Source: LK losses (arXiv 2602.23881)."""
    return -jnp.log(jnp.maximum(overlap(logits, teacher.full_probs), 1e-5))


def lk(logits: jax.Array, teacher: Teacher, mixture: Mixture = PLAIN_MIXTURE) -> jax.Array:
    """w KL + (1 - w)(1 - overlap), w the mixture's share at the slot's own overlap. Source: speculators 0.9.0."""
    accepted = overlap(logits, teacher.full_probs)
    w = mixture.share(accepted)
    return w * kl(logits, teacher) + (1.0 - w) * (1.0 - accepted)


LOSSES: dict[str, Loss] = {
    "soft_ce": soft_ce,
    "hard_ce": hard_ce,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "tv": tv,
    "nla": nla,
    "lk": lk,
}
ACCEPTANCE = ("tv", "nla", "lk", "lk_step", "length")
"""Losses of the chance to be accepted."""
WHOLE = ("lk_step", "length")
"""Losses of a slot that depend on other slots too: `whole.py`."""


def parse_loss(text: str) -> Terms:
    """ "0.1*hard_ce+0.9*tv" -> ((0.1, "hard_ce"), (0.9, "tv")). UserError for an unknown name or weight."""
    terms = []
    for part in text.replace(" ", "").split("+"):
        weight, star, name = part.rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            raise UserError(f"The loss {text!r} has the weight {weight!r}, which is not a number.") from None
        if name not in LOSSES and name not in WHOLE:
            raise UserError(f"The loss {text!r} names {name!r}; the losses are {', '.join((*LOSSES, *WHOLE))}.")
        terms.append((value, name))
    return tuple(terms)


def weighted(terms: Terms, mixture: Mixture = PLAIN_MIXTURE, factors: tuple[Any, ...] = ()) -> Loss:
    """The weighted sum of named losses as one loss; each term multiplied with its factor, where it has one."""

    def total(logits: jax.Array, teacher: Teacher) -> jax.Array:
        parts = []
        for (weight, name), factor in itertools.zip_longest(terms, factors):
            loss = lk(logits, teacher, mixture) if name == "lk" else LOSSES[name](logits, teacher)
            parts.append(weight * loss if factor is None else weight * factor * loss)
        return sum(parts[1:], start=parts[0])

    return total
