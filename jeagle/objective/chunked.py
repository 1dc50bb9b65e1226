"""The loss over vocabulary-wide logits, a chunk of teacher positions at a time, its gradients made on the way.

Slots are laid out by the position that teaches them: all TTT steps that learn from position m stand together, so the
teacher's softmax is made once a position, and one chunk's logits are the only vocabulary-wide arrays alive. The loss is
a scalar, so a chunk's gradients are made in the forward pass and merely scaled in the backward pass: no second matmul.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.interfaces import PLAIN_LOGITS, LogitShape
from jeagle.objective.losses import Mixture, Teacher, Terms, overlap, weighted
from jeagle.runtime.numerics import add_in_place, as_bits, first_largest, from_bits, rows_product, summed_product

_LARGEST_PRODUCT = 2**25  # numbers

_UNKNOWN = -1e30  # of a token that is not among those known: no probability, yet no nan where none is known


class Known(NamedTuple):
    """A truncated teacher: P entries of the target's distribution over its whole vocabulary, at each position.

    What is learnt from is renormalised over what is known of the draft vocabulary. What acceptance is taken against is
    not: a token of which nothing is known counts as one that the target never says, so that acceptance is understated,
    by the mass of the unknown at most. (Not so where a recipe is `renormalised`.)

    Attributes:
      entries_BMP: as draft vocabulary entries, D where the draft has none.
      log_probs_BMP: logs of their probabilities over the whole vocabulary.
    """

    entries_BMP: jax.Array
    log_probs_BMP: jax.Array


class Taught(NamedTuple):
    """Teacher positions and what they teach, [B, M, ...].

    Attributes:
      source: the target's final states [B, M, H], which head_DH reads; or what is known of its distributions.
      head_DH: the target's lm_head rows of the draft vocabulary.
      lse_BM: logsumexp of the target's logits over its whole vocabulary.
      label_BM: the target's argmax as a draft vocabulary entry, -1 where the draft cannot say it.
      weight_BMK: what a slot's loss is multiplied with; 0 where there is none.
      slot_BMK: the slot (index in N) that each position teaches at each step; N where there is none.
      factors: of each of the recipe's terms, what it is multiplied with at each slot [B, M, K]; None is 1.
    """

    source: jax.Array | Known
    head_DH: jax.Array
    lse_BM: jax.Array
    label_BM: jax.Array
    weight_BMK: jax.Array
    slot_BMK: jax.Array
    factors: tuple[jax.Array | None, ...] = ()


class Slotwise(NamedTuple):
    """What the chunks leave behind for metrics: [B, M, K] each, without gradient."""

    loss: jax.Array
    accepted: jax.Array
    correct: jax.Array


class Recipe(NamedTuple):
    """What is static about a loss.

    Attributes:
      terms: weighted loss names.
      renormalised: acceptance is taken against the teacher renormalised over the draft vocabulary (speculators), not
        over the whole one (SpecForge, and what a server does).
      dtype: of the matrix products; sums are float32 or better.
      chunk: M positions of each row at a time; M must be a multiple of it.
      logits: what the target's family does to its logits.
      temperature: the teacher's, of all but the acceptance that is not renormalised.
      mixture: of `lk`.
    """

    terms: Terms
    renormalised: bool
    dtype: Any
    chunk: int
    logits: LogitShape = PLAIN_LOGITS
    temperature: float = 1.0
    mixture: Mixture = Mixture()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss(
    recipe: Recipe, hidden_KBNW: jax.Array, lm_head_DW: jax.Array, taught: Taught
) -> tuple[jax.Array, Slotwise]:
    """sum of weight * loss over all slots, and the slots' figures.

    Args:
      hidden_KBNW: what the draft's lm_head reads at the slots.
      lm_head_DW: the draft's lm_head.

    Source: EAGLE-3 (arXiv 2503.01840) for the loss; gradients in the forward pass as in Liger (arXiv 2410.10989).
    """
    total, slotwise, _ = _scan(recipe, hidden_KBNW, lm_head_DW, taught, with_gradient=False)
    return total, slotwise


def _forward(recipe, hidden_KBNW, lm_head_DW, taught):
    total, slotwise, (dhidden, dhead_WD) = _scan(recipe, hidden_KBNW, lm_head_DW, taught, with_gradient=True)
    return (total, slotwise), (dhidden, dhead_WD.T.astype(lm_head_DW.dtype), taught)


def _backward(recipe, residuals, cotangents):
    dhidden, dhead, taught = residuals
    scale = cotangents[0]
    nothing = jax.tree.map(_zero_cotangent, taught)
    return (dhidden * scale).astype(dhidden.dtype), (dhead * scale).astype(dhead.dtype), nothing


chunked_loss.defvjp(_forward, _backward)


def _zero_cotangent(x: jax.Array) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else None


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, M, ...] -> [chunks, B, m, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _scan(recipe, hidden_KBNW, lm_head_DW, taught, *, with_gradient):
    """-> (the sum, the slots' figures by teacher position, the gradients of hidden and, transposed, of the head)."""
    dtype, chunk = recipe.dtype, recipe.chunk
    kind = jnp.promote_types(dtype, jnp.float32)
    lm_head, teacher_head = lm_head_DW.astype(dtype), taught.head_DH.astype(dtype)
    hidden_bits = as_bits(hidden_KBNW)

    def body(carry, parts):
        total, gradients = carry
        source, lse, label, weight, slot, factors = parts
        at = places(slot)
        hidden = from_bits(hidden_bits.at[at].get(mode="clip"), hidden_KBNW.dtype).astype(dtype)
        if isinstance(source, Known):
            teacher = _teacher(recipe, _known_logits(source, len(teacher_head)), jnp.zeros_like(lse))
        else:
            teacher = _teacher(recipe, recipe.logits(rows_product(source.astype(dtype), teacher_head, rows=True)), lse)
        logits = rows_product(hidden, lm_head, rows=True)
        losses, chunk_total, dlogits = _loss(recipe, logits, teacher, weight, factors, with_gradient)
        correct = first_largest(logits) == label[..., None]
        slotwise = Slotwise(losses, overlap(logits, teacher.full_probs), correct)
        if with_gradient:
            dhidden_bits, dhead_WD = gradients
            dlogits = dlogits.astype(dtype)
            found = as_bits(rows_product(dlogits, lm_head).astype(hidden_KBNW.dtype))
            dhidden_bits = dhidden_bits.at[at].set(found, mode="drop")
            gradients = dhidden_bits, _with_product(dhead_WD, hidden, dlogits)
        return (total + chunk_total, gradients), slotwise

    nothing = (jnp.zeros_like(hidden_bits), jnp.zeros(lm_head_DW.shape[::-1], kind)) if with_gradient else ()
    parts = taught.source, taught.lse_BM, taught.label_BM, taught.weight_BMK, taught.slot_BMK, taught.factors
    chunks = jax.tree.map(lambda x: _split(x, chunk), parts)
    (total, gradients), slotwise = jax.lax.scan(body, (jnp.zeros((), kind), nothing), chunks)
    if with_gradient:
        gradients = from_bits(gradients[0], hidden_KBNW.dtype), gradients[1]
    return total, jax.tree.map(_join, slotwise), gradients


def places(slot_BmK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices into an array [K, B, N, ...]."""
    batch, _, steps = slot_BmK.shape
    return jnp.arange(steps), jnp.arange(batch)[:, None, None], slot_BmK


def _with_product(sums_WD: jax.Array, hidden: jax.Array, dlogits: jax.Array) -> jax.Array:
    """The sums and hidden^T dlogits; on a CPU in pieces, for it adds only to a product that is there already, and a
    second gradient would exist. A TPU adds while it multiplies, and would pad each piece to the whole."""
    return jax.lax.platform_dependent(
        sums_WD, hidden, dlogits, cpu=_in_pieces, default=lambda sums, a, b: sums + summed_product(a, b)
    )


def _in_pieces(sums_WD: jax.Array, hidden: jax.Array, dlogits: jax.Array) -> jax.Array:
    """Pieces of W, not of D: a mesh may split the vocabulary, and cutting along it would gather all sums."""
    width = sums_WD.shape[0]
    pieces = -(-sums_WD.size // _LARGEST_PRODUCT)
    each = -(-width // (pieces * 128)) * 128
    for start in range(0, width, each):
        # The narrow operand first: the CPU backend copies the first one into place.
        found = summed_product(hidden[..., start : start + each], dlogits)
        sums_WD = add_in_place(sums_WD, found, start, 0)
    return sums_WD


def _teacher(recipe: Recipe, logits_BmD: jax.Array, lse_Bm: jax.Array) -> Teacher:
    """The same distribution for all steps: [B, m, 1, D]."""
    logits = logits_BmD[:, :, None]
    softened = logits if recipe.temperature == 1.0 else logits / recipe.temperature
    normaliser = jax.nn.logsumexp(softened, axis=-1, keepdims=True)
    probs = jnp.exp(softened - normaliser)
    if recipe.renormalised:
        return Teacher(probs, probs)
    if recipe.temperature == 1.0:
        return Teacher(probs, probs * jnp.exp(normaliser - lse_Bm[..., None, None]))
    return Teacher(probs, jnp.exp(logits - lse_Bm[..., None, None]))


def _known_logits(known: Known, size: int) -> jax.Array:
    """What is known as logits [B, m, D] whose logsumexp over the whole vocabulary is 0."""
    log_probs = known.log_probs_BMP
    rows, places = jnp.arange(len(log_probs))[:, None, None], jnp.arange(log_probs.shape[1])[None, :, None]
    nothing = jnp.full((*log_probs.shape[:2], size), _UNKNOWN, log_probs.dtype)
    return nothing.at[rows, places, known.entries_BMP].set(log_probs, mode="drop")


def _loss(recipe: Recipe, logits, teacher: Teacher, weight, factors, with_gradient: bool):
    """-> (loss of each slot, their weighted sum, its gradient if asked for)."""
    loss_of = weighted(recipe.terms, recipe.mixture, factors)

    def weighted_sum(logits):
        losses = loss_of(logits, teacher)
        return jnp.sum(jnp.where(weight != 0, losses * weight, 0.0)), losses

    if not with_gradient:
        total, losses = weighted_sum(logits)
        return losses, total, None
    (total, losses), gradient = jax.value_and_grad(weighted_sum, has_aux=True)(logits)
    return losses, total, gradient
