"""Predictions and the target's features -> one loss, and the metrics that describe how well a draft does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jeagle.align import Selected, take_rows
from jeagle.interfaces import PLAIN_LOGITS, Batch, Features, LogitShape, Predictions, Tables, TopK
from jeagle.objective.chunked_loss import (
    LossOptions,
    SlotMetrics,
    TeacherPositions,
    TruncatedTeacher,
    chunked_loss,
    slot_index,
)
from jeagle.objective.coupled_losses import split_by_slot
from jeagle.objective.dialects import ObjectiveSpec
from jeagle.objective.losses import COUPLED_LOSSES
from jeagle.runtime.mesh import summed_over

CPU_CHUNK, ACCELERATOR_CHUNK = 512, 2048
"""Slots, of all rows and steps of a device together, whose logits exist at a time. An accelerator reads both lm_heads
for each chunk, so that it needs more slots per chunk."""


class Metrics(NamedTuple):
    """Sums over the global batch per TTT step, all [K] float32; divided by each other, they give means.

    Attributes:
      loss: step k's normalised loss, without the decay.
      counting: slots that count.
      correct: slots that count whose draft argmax is the target's argmax.
      trained: slots that carry loss; fewer than counting where out-of-vocabulary ones are dropped.
      accepted: sum over trained slots of sum_v min(p_v, q_v), p being over the whole vocabulary.
      prefix_counting, prefix_correct: slots whose steps 0..k all count, and those of them that are all correct: what
        chain decoding accepts.
      prefix_accepted: over the same slots, the probability that all steps so far are accepted when tokens are sampled.
    """

    loss: Float[Array, " K"]
    counting: Float[Array, " K"]
    correct: Float[Array, " K"]
    trained: Float[Array, " K"]
    accepted: Float[Array, " K"]
    prefix_counting: Float[Array, " K"]
    prefix_correct: Float[Array, " K"]
    prefix_accepted: Float[Array, " K"]


def objective(
    spec: ObjectiveSpec,
    predictions: Predictions,
    features: Features,
    batch: Batch,
    tables: Tables,
    lm_head_DW: Float[Array, "D W"],
    teachers: Selected,
    *,
    dtype: Any,
    slots: Selected,
    logits: LogitShape = PLAIN_LOGITS,
    divisor_K: Float[Array, " K"] | None = None,
    over: tuple[str, ...] = (),
    chunk_rows: int = CPU_CHUNK,
) -> tuple[Float[Array, ""], Metrics]:
    """The scalar loss of the global batch and its metrics; its gradient on a device is that of the device's own rows.

    Args:
      predictions: of `drafts.unroll`, at the live `slots`.
      features: greedy and lse must be valid at every teacher position.
      lm_head_DW: the draft's own head, trained or not.
      teachers: the M positions of each row that teach some slot that counts.
      slots: the N live slots.
      logits: what the target's family does to its logits.
      divisor_K: `divisors` of the whole batch, where `batch` is only a part of it.
      over: mesh axes over which a surrounding `shard_map` splits the rows.
      chunk_rows: slots whose logits exist at a time.

    Source: EAGLE-3 (arXiv 2503.01840); the switches of `spec` name the differences between its trainers.
    """
    length, width = batch.tokens_BT.shape[1], predictions.counts_KBN.shape[2]
    counts_KBN, entries = predictions.counts_KBN, jnp.arange(len(tables.draft_to_target_D))
    # Each token as an entry of the draft vocabulary; -1 where the draft vocabulary lacks it.
    entry_V = jnp.full(len(tables.embed_VW), -1, jnp.int32).at[tables.draft_to_target_D].set(entries)
    label_BT = entry_V[features.greedy_BT]
    teacher_KBN = jnp.minimum(predictions.taught_by_KBN, length - 1)
    label_KBN = jax.vmap(take_rows, (None, 0))(label_BT, teacher_KBN)
    trained_KBN = counts_KBN & (label_KBN >= 0) if spec.mask_out_of_vocab else counts_KBN

    segments_BN = take_rows(batch.segments_BT, slots.positions_BN)
    if divisor_K is None:
        divisor_K = divisors(spec, trained_KBN, segments_BN, batch.tokens_BT.shape, over)
    scale_KBN = jnp.broadcast_to((1.0 / divisor_K)[:, None, None], trained_KBN.shape)
    if spec.normaliser == "document":  # each document's slots share its weight
        sizes_KBS = _by_document(trained_KBN, segments_BN, length)
        scale_KBN = scale_KBN / jnp.maximum(jax.vmap(take_rows, (0, None))(sizes_KBS, segments_BN), 1)
    decay_K = spec.decay ** jnp.arange(len(counts_KBN), dtype=scale_KBN.dtype)
    weight_KBN = jnp.where(trained_KBN, scale_KBN * decay_K[:, None, None], 0.0)

    slot_BMK, present_BMK = _slot_of_teacher(predictions, teachers, length)
    source, knows_BM = _teacher_source(features.teacher, teachers.positions_BN, entry_V, len(tables.head_DH))
    present_BMK = present_BMK & knows_BM[..., None]
    at = slot_index(slot_BMK)
    taught = TeacherPositions(
        source=source,
        head_DH=tables.head_DH,
        lse_BM=take_rows(features.lse_BT, teachers.positions_BN),
        label_BM=take_rows(label_BT, teachers.positions_BN),
        weight_BMK=jnp.where(present_BMK, weight_KBN[at], 0.0),
        slot_BMK=jnp.where(present_BMK, slot_BMK, width),
    )
    chunk = _chunk(slot_BMK.shape, chunk_rows)
    options = LossOptions(spec.terms(), spec.renormalised, dtype, chunk, logits, spec.temperature, spec.kl_share)
    rest_K = jnp.zeros_like(decay_K)
    if any(name in COUPLED_LOSSES for _, name in options.terms):
        frozen = jax.lax.stop_gradient((predictions.hidden_KBNW, lm_head_DW, taught))
        _, first_pass = chunked_loss(options._replace(terms=((1.0, "tv"),)), *frozen)
        accepted, present = _by_slot((first_pass.accepted, present_BMK), slot_BMK, present_BMK, width)
        carries_loss = trained_KBN & (present > 0)
        terms, factors, rest_K = split_by_slot(
            options.terms, accepted, carries_loss, scale_KBN, spec.decay, spec.kl_share, over
        )
        options = options._replace(terms=terms)
        taught = taught._replace(factors=tuple(None if f is None else f[at] for f in factors))
    loss, by_teacher = chunked_loss(options, predictions.hidden_KBNW, lm_head_DW, taught)
    by_slot = _by_slot(by_teacher, slot_BMK, present_BMK, width)
    metrics = _metrics(by_slot, counts_KBN, trained_KBN, scale_KBN, rest_K)
    # NaN of the target's may lie where no loss is computed, such as in a logit that the draft vocabulary lacks.
    finite = jnp.isfinite(taught.lse_BM).all()
    metrics = metrics._replace(loss=jnp.where(finite, metrics.loss, jnp.nan))
    return summed_over((jnp.where(finite, loss + jnp.sum(decay_K * rest_K), jnp.nan), metrics), over)


def _teacher_source(
    teacher: jax.Array | TopK, positions_BM: jax.Array, entry_V: jax.Array, size: int
) -> tuple[jax.Array | TruncatedTeacher, jax.Array]:
    """(What teaches at M positions of each row, whether it knows any of the draft's `size` tokens [B, M]).

    A slot whose teacher knows none has no loss and is never accepted; means count it nevertheless.
    """
    rows = jax.tree.map(lambda x: take_rows(x, positions_BM), teacher)
    if not isinstance(rows, TopK):
        return rows, jnp.ones(positions_BM.shape, bool)
    entries_BMP = entry_V[rows.ids_BTP]
    known_BMP = entries_BMP >= 0
    return TruncatedTeacher(jnp.where(known_BMP, entries_BMP, size), rows.log_probs_BTP), known_BMP.any(axis=-1)


def divisors(
    spec: ObjectiveSpec,
    trained_KBX: Bool[Array, "K B X"],
    segments_BX: Int[Array, "B X"],
    shape: tuple[int, int],
    over: tuple[str, ...] = (),
) -> Float[Array, " K"]:
    """What each step's loss is divided by: all slots, those that carry loss, or the documents that have such slots.

    Args:
      trained_KBX: the slots that carry loss.
      segments_BX: their documents.
      shape: of the batch, [B, T].
      over: as in `objective`.
    """
    if spec.normaliser == "all_slots":
        return jnp.full(len(trained_KBX), jnp.float32(summed_over(shape[0] * shape[1], over)))
    if spec.normaliser == "counting":
        # Dividing by the slots that count, dropped ones included, would let the vocabulary change the scale.
        return jnp.maximum(summed_over(trained_KBX.sum(axis=(1, 2)), over), 1).astype(jnp.float32)
    documents_KB = (_by_document(trained_KBX, segments_BX, shape[1]) > 0).sum(axis=2)
    return jnp.maximum(summed_over(documents_KB.sum(axis=1), over), 1).astype(jnp.float32)


def _by_document(trained_KBX: jax.Array, segments_BX: jax.Array, length: int) -> jax.Array:
    """The number of slots that carry loss in each document, [K, B, T + 1]."""

    def row(trained_X: jax.Array, segments_X: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(trained_X.astype(jnp.float32), segments_X, length + 1)

    return jax.vmap(jax.vmap(row), (0, None))(trained_KBX, segments_BX)


def _slot_of_teacher(predictions: Predictions, teachers: Selected, length: int) -> tuple[jax.Array, jax.Array]:
    """(The slot, as index in N, that each teacher position teaches at each step; whether there is one): [B, M, K]."""
    steps, batch, width = predictions.counts_KBN.shape
    read = jnp.where(predictions.counts_KBN, predictions.taught_by_KBN, length)
    k, b = jnp.arange(steps)[:, None, None], jnp.arange(batch)[None, :, None]
    slot_BTK = jnp.full((batch, length, steps), width, jnp.int32).at[b, read, k].set(jnp.arange(width), mode="drop")
    slot_BMK = take_rows(slot_BTK, teachers.positions_BN)
    present = (slot_BMK < width) & teachers.live_BN[..., None]
    return jnp.where(present, slot_BMK, 0), present


def _chunk(shape: tuple[int, ...], rows: int) -> int:
    """For slots [B, M, K] by teacher, the largest divisor of M with which a chunk has at most `rows` rows of logits."""
    batch, width, steps = shape
    wanted = max(1, rows // (batch * steps))
    return max(d for d in range(1, min(wanted, width) + 1) if width % d == 0)


def _by_slot(by_teacher: Any, slot_BMK: jax.Array, present_BMK: jax.Array, width: int) -> Any:
    """Arrays [B, M, K] by teacher -> float32 [K, B, N] by slot; 0 for slots without a teacher."""
    batch, _, steps = slot_BMK.shape
    at = slot_index(jnp.where(present_BMK, slot_BMK, width))

    def scatter(values: jax.Array) -> jax.Array:
        return jnp.zeros((steps, batch, width), jnp.float32).at[at].set(values, mode="drop")

    return jax.tree.map(scatter, by_teacher)


def _metrics(
    by_slot: SlotMetrics, counts: jax.Array, trained: jax.Array, scale: jax.Array, rest_K: jax.Array
) -> Metrics:
    def total(values: jax.Array) -> jax.Array:
        return values.sum(axis=(1, 2), dtype=jnp.float32)

    return Metrics(
        loss=total(jnp.where(trained, by_slot.loss * scale, 0.0)) + rest_K,
        counting=total(counts),
        correct=total(by_slot.correct * counts),
        trained=total(trained),
        accepted=total(jnp.where(trained, by_slot.accepted, 0.0)),
        prefix_counting=total(jnp.cumprod(counts, axis=0, dtype=jnp.float32)),
        prefix_correct=total(jnp.cumprod(by_slot.correct * counts, axis=0)),
        prefix_accepted=total(jnp.cumprod(by_slot.accepted * counts, axis=0)),
    )
