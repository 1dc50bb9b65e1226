"""The loss over vocabulary-wide logits, a chunk of teacher positions at a time, with gradients from the forward pass.

Slots are arranged by the position that teaches them: all TTT steps that learn from position m are together, so that the
teacher's softmax is computed once per position, and the logits of one chunk are the only vocabulary-wide arrays. The
loss is a scalar, so a chunk's gradients are computed in the forward pass and only scaled in the backward pass, without
a second matrix product.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jeagle.interfaces import PLAIN_LOGITS, LogitShape
from jeagle.objective.losses import KLShare, TeacherProbs, Terms, overlap, weighted_sum
from jeagle.runtime.xla_workarounds import add_matmul, argmax_by_blocks, as_bits, flat_matmul, from_bits

_UNKNOWN = -1e30
"""The logit of a token whose probability is not known: it gets no probability, and no NaN where none is known."""


class TruncatedTeacher(NamedTuple):
    """The P known entries of the target's distribution over its whole vocabulary, at each teacher position.

    What is learnt is the distribution renormalised over the known tokens of the draft vocabulary. Acceptance is not
    renormalised: a token whose probability is not known counts as one that the target never generates, so acceptance is
    understated, by the unknown probability at most. (Where `LossOptions.renormalised` is true, it may be overstated.)

    Attributes:
      entries_BMP: as draft vocabulary entries; D where the draft vocabulary lacks the token.
      log_probs_BMP: logs of their probabilities over the whole vocabulary.
    """

    entries_BMP: Int[Array, "B M P"]
    log_probs_BMP: Float[Array, "B M P"]


class TeacherPositions(NamedTuple):
    """The M teacher positions of each row, and the slots that they teach.

    Attributes:
      source: the target's last hidden states [B, M, H], or the known entries of its distributions.
      head_DH: the target's lm_head rows of the draft vocabulary.
      lse_BM: logsumexp of the target's logits over its whole vocabulary.
      label_BM: the target's argmax as a draft vocabulary entry; -1 where the draft vocabulary lacks it.
      weight_BMK: what a slot's loss is multiplied by; 0 where there is no slot.
      slot_BMK: the slot (index in N) that each position teaches at each step; N where there is none.
      factors: what each of the loss's terms is multiplied by at each slot [B, M, K]; None is 1.
    """

    source: Float[Array, "B M H"] | TruncatedTeacher
    head_DH: Float[Array, "D H"]
    lse_BM: Float[Array, "B M"]
    label_BM: Int[Array, "B M"]
    weight_BMK: Float[Array, "B M K"]
    slot_BMK: Int[Array, "B M K"]
    factors: tuple[jax.Array | None, ...] = ()


class SlotMetrics(NamedTuple):
    """What metrics are made from: [B, M, K] each, without gradient."""

    loss: jax.Array
    accepted: jax.Array
    correct: jax.Array


class LossOptions(NamedTuple):
    """What is static about a loss.

    Attributes:
      terms: weighted names of losses.
      renormalised: acceptance is computed against the teacher renormalised over the draft vocabulary (speculators), not
        over the whole one (SpecForge, and what a server does).
      dtype: type of the matrix products; sums are float32 or better.
      chunk: teacher positions of each row at a time; M must be a multiple of it.
      logits: what the target's family does to its logits.
      temperature: of the teacher, but not of acceptance that is not renormalised.
      kl_share: of `lk`.
    """

    terms: Terms
    renormalised: bool
    dtype: Any
    chunk: int
    logits: LogitShape = PLAIN_LOGITS
    temperature: float = 1.0
    kl_share: KLShare = KLShare()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss(
    options: LossOptions,
    hidden_KBNW: Float[Array, "K B N W"],
    lm_head_DW: Float[Array, "D W"],
    teachers: TeacherPositions,
) -> tuple[Float[Array, ""], SlotMetrics]:
    """(The sum of weight * loss over all slots, the slots' metrics).

    Args:
      hidden_KBNW: what the draft's lm_head reads at the slots.
      lm_head_DW: the draft's lm_head.

    Source: EAGLE-3 (arXiv 2503.01840) for the loss; gradients in the forward pass as in Liger (arXiv 2410.10989).
    """
    total, metrics, _ = _scan_chunks(options, hidden_KBNW, lm_head_DW, teachers, with_gradient=False)
    return total, metrics


def _forward(options, hidden_KBNW, lm_head_DW, teachers):
    total, metrics, (dhidden, dhead_WD) = _scan_chunks(options, hidden_KBNW, lm_head_DW, teachers, with_gradient=True)
    return (total, metrics), (dhidden, dhead_WD.T.astype(lm_head_DW.dtype), teachers)


def _backward(options, residuals, cotangents):
    dhidden, dhead, teachers = residuals
    scale = cotangents[0]
    none = jax.tree.map(lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else None, teachers)
    return (dhidden * scale).astype(dhidden.dtype), (dhead * scale).astype(dhead.dtype), none


chunked_loss.defvjp(_forward, _backward)


def _scan_chunks(options, hidden_KBNW, lm_head_DW, teachers, *, with_gradient):
    """(The sum, the slots' metrics by teacher position, the gradients of hidden and, transposed, of the head)."""
    dtype = options.dtype
    sum_type = jnp.promote_types(dtype, jnp.float32)
    lm_head, teacher_head = lm_head_DW.astype(dtype), teachers.head_DH.astype(dtype)
    hidden_bits = as_bits(hidden_KBNW)

    def add_chunk(carry, chunk):
        total, gradients = carry
        source, lse, label, weight, slot, factors = chunk
        at = slot_index(slot)
        hidden = from_bits(hidden_bits.at[at].get(mode="clip"), hidden_KBNW.dtype).astype(dtype)
        teacher = _teacher(options, source, teacher_head, lse)
        logits = flat_matmul(hidden, lm_head, transposed=True)
        (chunk_total, losses), dlogits = _loss(options, logits, teacher, weight, factors, with_gradient)
        accepted = overlap(logits, teacher.full_probs)
        # What is no number is neither accepted nor correct. The lse tells of the target: XLA's CPU backend takes the
        # minimum of NaN and a number to be the number.
        finite = jnp.isfinite(accepted) & jnp.isfinite(lse[..., None])
        correct = (argmax_by_blocks(logits) == label[..., None]) & finite
        metrics = SlotMetrics(losses, jnp.where(finite, accepted, 0.0), correct)
        if with_gradient:
            dhidden_bits, dhead_WD = gradients
            dlogits = dlogits.astype(dtype)
            chunk_dhidden = as_bits(flat_matmul(dlogits, lm_head).astype(hidden_KBNW.dtype))
            dhidden_bits = dhidden_bits.at[at].set(chunk_dhidden, mode="drop")
            gradients = dhidden_bits, add_matmul(dhead_WD, hidden, dlogits)
        return (total + chunk_total, gradients), metrics

    zeros = (jnp.zeros_like(hidden_bits), jnp.zeros(lm_head_DW.shape[::-1], sum_type)) if with_gradient else ()
    arrays = (teachers.source, *teachers[2:])
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, options.chunk, *x.shape[2:]), 1, 0), arrays)
    (total, gradients), metrics = jax.lax.scan(add_chunk, (jnp.zeros((), sum_type), zeros), chunks)
    if with_gradient:
        gradients = from_bits(gradients[0], hidden_KBNW.dtype), gradients[1]
    metrics = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), metrics)
    return total, metrics, gradients


def slot_index(slot_BMK: Int[Array, "B M K"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices of these slots into an array [K, B, N, ...]; indexing gives [B, M, K, ...]."""
    batch, _, steps = slot_BMK.shape
    return jnp.arange(steps), jnp.arange(batch)[:, None, None], slot_BMK


def _teacher(options: LossOptions, source, head_DH: jax.Array, lse_Bm: jax.Array) -> TeacherProbs:
    """The teacher's probabilities, the same for all steps: [B, m, 1, D]."""
    if isinstance(source, TruncatedTeacher):  # known probabilities are logits whose logsumexp is 0
        known_BmP, lse_Bm = source.log_probs_BMP, jnp.zeros_like(lse_Bm)
        at = jnp.arange(len(known_BmP))[:, None, None], jnp.arange(known_BmP.shape[1])[None, :, None]
        unknown_BmD = jnp.full((*known_BmP.shape[:2], len(head_DH)), _UNKNOWN, known_BmP.dtype)
        logits_BmD = unknown_BmD.at[(*at, source.entries_BMP)].set(known_BmP, mode="drop")
    else:
        logits_BmD = options.logits(flat_matmul(source.astype(head_DH.dtype), head_DH, transposed=True))
    logits = logits_BmD[:, :, None]
    softened = logits if options.temperature == 1.0 else logits / options.temperature
    normaliser = jax.nn.logsumexp(softened, axis=-1, keepdims=True)
    probs = jnp.exp(softened - normaliser)
    if options.renormalised:
        return TeacherProbs(probs, probs)
    if options.temperature == 1.0:
        return TeacherProbs(probs, probs * jnp.exp(normaliser - lse_Bm[..., None, None]))
    return TeacherProbs(probs, jnp.exp(logits - lse_Bm[..., None, None]))


def _loss(options: LossOptions, logits, teacher: TeacherProbs, weight, factors, with_gradient: bool):
    """((The weighted sum over the slots, the loss of each slot), the sum's gradient or None)."""
    loss_of = weighted_sum(options.terms, options.kl_share, factors)

    def total_of(logits):
        losses = loss_of(logits, teacher)
        return jnp.sum(jnp.where(weight != 0, losses * weight, 0.0)), losses

    return jax.value_and_grad(total_of, has_aux=True)(logits) if with_gradient else (total_of(logits), None)
