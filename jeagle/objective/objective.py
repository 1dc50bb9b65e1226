"""Predictions and the target's features -> one loss, and the figures that tell how a draft does."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.align import Selected, take_rows
from jeagle.joints import PLAIN_LOGITS, Batch, Features, LogitShape, Predictions, Tables
from jeagle.objective.chunked import Recipe, Slotwise, Taught, chunked_loss
from jeagle.objective.dialects import ObjectiveSpec

CHUNK_ROWS = 1024  # slots (of all rows and steps together) whose logits exist at a time


class Figures(NamedTuple):
    """Sums over the global batch, per TTT step, all [K] float32: dividing them gives the means.

    Attributes:
      loss: step k's normalised loss, decay not applied.
      counting: slots that count.
      correct: of those, the draft's argmax is the target's argmax.
      trained: slots that carry loss (fewer than counting where out-of-vocabulary ones are dropped).
      accepted: sum over trained slots of sum_v min(p_v, q_v), p over the whole vocabulary.
      prefix_counting, prefix_correct: slots whose steps 0..k all count, and of those the ones all right so far: what
        chain decoding accepts.
    """

    loss: jax.Array
    counting: jax.Array
    correct: jax.Array
    trained: jax.Array
    accepted: jax.Array
    prefix_counting: jax.Array
    prefix_correct: jax.Array


def objective(
    spec: ObjectiveSpec,
    predictions: Predictions,
    features: Features,
    batch: Batch,
    tables: Tables,
    lm_head_DW: jax.Array,
    teachers: Selected,
    *,
    dtype: Any,
    slots: Selected,
    logits: LogitShape = PLAIN_LOGITS,
) -> tuple[jax.Array, Figures]:
    """The scalar loss of the global batch and its figures.

    Args:
      predictions: of `drafts.unroll`, at the live `slots`.
      features: greedy and lse must be there at every teacher position.
      lm_head_DW: the draft's own head, trained or not.
      teachers: the M positions of each row that teach some counting slot.
      slots: positions of the N live slots (for weighing by document).
      logits: what the target's family does to its logits.

    Source: EAGLE-3 (arXiv 2503.01840); the switches of `spec` name the differences between its trainers.
    """
    label_BT = _draft_labels(features.greedy_BT, tables)
    label_KBN = jax.vmap(lambda read: take_rows(label_BT, jnp.minimum(read, label_BT.shape[1] - 1)))(
        predictions.taught_by_KBN
    )
    counts_KBN = predictions.counts_KBN
    trained_KBN = counts_KBN & (label_KBN >= 0) if spec.mask_out_of_vocab else counts_KBN
    scale_KBN = _scale(spec, trained_KBN, batch, slots)
    decay_K = spec.decay ** jnp.arange(counts_KBN.shape[0], dtype=scale_KBN.dtype)
    weight_KBN = jnp.where(trained_KBN, scale_KBN * decay_K[:, None, None], 0.0)

    slot_BMK, present_BMK = _slot_of_teacher(predictions, teachers, label_BT.shape[1])
    taught = Taught(
        last_BMH=take_rows(features.last_BTH, teachers.positions_BN),
        head_DH=tables.head_DH,
        lse_BM=take_rows(features.lse_BT, teachers.positions_BN),
        label_BM=take_rows(label_BT, teachers.positions_BN),
        weight_BMK=jnp.where(present_BMK, _take(weight_KBN, slot_BMK), 0.0),
    )
    hidden_BMKW = _take(predictions.hidden_KBNW, slot_BMK)
    recipe = Recipe(spec.terms(), spec.renormalised, dtype, _chunk(*slot_BMK.shape), logits)
    loss, by_teacher = chunked_loss(recipe, hidden_BMKW, lm_head_DW, taught)
    by_slot = _by_slot(by_teacher, slot_BMK, present_BMK, counts_KBN.shape[2])
    return loss, _figures(by_slot, counts_KBN, trained_KBN, scale_KBN)


def _draft_labels(greedy_BT: jax.Array, tables: Tables) -> jax.Array:
    """The target's argmax as a draft vocabulary entry; -1 where the draft cannot say it."""
    entries = tables.draft_to_target_D.shape[0]
    index_V = jnp.full(tables.embed_VW.shape[0], -1, jnp.int32).at[tables.draft_to_target_D].set(jnp.arange(entries))
    return index_V[greedy_BT]


def _scale(spec: ObjectiveSpec, trained_KBN: jax.Array, batch: Batch, slots: Selected) -> jax.Array:
    """What each slot's loss is multiplied with before the decay: one number a step, but for "document"."""
    if spec.normaliser == "all_slots":
        return jnp.full(trained_KBN.shape, 1.0 / batch.tokens_BT.size)
    if spec.normaliser == "counting":
        # Dividing by the slots that count, dropped ones included, would let the vocabulary change the scale.
        total_K = trained_KBN.sum(axis=(1, 2))
        return jnp.broadcast_to((1.0 / jnp.maximum(total_K, 1))[:, None, None], trained_KBN.shape)
    segments_BN = take_rows(batch.segments_BT, slots.positions_BN)
    most = batch.tokens_BT.shape[1] + 1

    def per_row(trained_N: jax.Array, segments_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jax.ops.segment_sum(trained_N.astype(jnp.float32), segments_N, most)
        return own[segments_N], (own > 0).sum()

    own_KBN, documents_KB = jax.vmap(jax.vmap(per_row), (0, None))(trained_KBN, segments_BN)
    documents_K = jnp.maximum(documents_KB.sum(axis=1), 1)
    return 1.0 / (jnp.maximum(own_KBN, 1) * documents_K[:, None, None])


def _slot_of_teacher(predictions: Predictions, teachers: Selected, length: int) -> tuple[jax.Array, jax.Array]:
    """Which slot (index in N) each teacher position teaches at each step, and whether there is one: [B, M, K]."""
    steps, batch, width = predictions.counts_KBN.shape
    read = jnp.where(predictions.counts_KBN, predictions.taught_by_KBN, length)
    k, b = jnp.arange(steps)[:, None, None], jnp.arange(batch)[None, :, None]
    slot_BTK = jnp.full((batch, length, steps), width, jnp.int32).at[b, read, k].set(jnp.arange(width), mode="drop")
    slot_BMK = take_rows(slot_BTK, teachers.positions_BN)
    present = (slot_BMK < width) & teachers.live_BN[..., None]
    return jnp.where(present, slot_BMK, 0), present


def _places(slot_BMK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices into an array [K, B, N, ...]."""
    batch, _, steps = slot_BMK.shape
    return jnp.arange(steps), jnp.arange(batch)[:, None, None], slot_BMK


def _take(array_KBNX: jax.Array, slot_BMK: jax.Array) -> jax.Array:
    return array_KBNX[_places(slot_BMK)]


def _chunk(batch: int, width: int, steps: int) -> int:
    """The largest divisor of `width` that keeps a chunk at CHUNK_ROWS rows of logits or fewer."""
    wanted = max(1, CHUNK_ROWS // (batch * steps))
    return max(d for d in range(1, min(wanted, width) + 1) if width % d == 0)


def _by_slot(by_teacher: Slotwise, slot_BMK: jax.Array, present_BMK: jax.Array, width: int) -> Slotwise:
    batch, _, steps = slot_BMK.shape
    places = _places(jnp.where(present_BMK, slot_BMK, width))

    def scatter(values: jax.Array) -> jax.Array:
        return jnp.zeros((steps, batch, width), jnp.float32).at[places].set(values, mode="drop")

    return jax.tree.map(scatter, by_teacher)


def _figures(by_slot: Slotwise, counts: jax.Array, trained: jax.Array, scale: jax.Array) -> Figures:
    def total(values: jax.Array) -> jax.Array:
        return values.sum(axis=(1, 2), dtype=jnp.float32)

    prefix = jnp.cumprod(counts, axis=0, dtype=jnp.float32)
    return Figures(
        loss=total(jnp.where(trained, by_slot.loss * scale, 0.0)),
        counting=total(counts),
        correct=total(by_slot.correct * counts),
        trained=total(trained),
        accepted=total(jnp.where(trained, by_slot.accepted, 0.0)),
        prefix_counting=total(prefix),
        prefix_correct=total(jnp.cumprod(by_slot.correct * counts, axis=0)),
    )
