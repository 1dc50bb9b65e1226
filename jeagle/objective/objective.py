"""Predictions and the target's features -> one loss, and the figures that tell how a draft does."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.align import Selected, take_rows
from jeagle.interfaces import PLAIN_LOGITS, Batch, Features, LogitShape, Predictions, Tables, TopK
from jeagle.objective.chunked import Known, Recipe, Slotwise, Taught, chunked_loss, places
from jeagle.objective.coupled_losses import needs_first_pass, split
from jeagle.objective.dialects import ObjectiveSpec
from jeagle.runtime.mesh import summed_over

# Slots (of all of a device's rows and steps together) whose logits exist at a time. An accelerator reads both lm_heads
# for each chunk, which only many slots make worth it.
CPU_CHUNK, ACCELERATOR_CHUNK = 512, 2048


class Metrics(NamedTuple):
    """Sums over the global batch, per TTT step, all [K] float32: dividing them gives the means.

    Attributes:
      loss: step k's normalised loss, decay not applied.
      counting: slots that count.
      correct: of those, the draft's argmax is the target's argmax.
      trained: slots that carry loss (fewer than counting where out-of-vocabulary ones are dropped).
      accepted: sum over trained slots of sum_v min(p_v, q_v), p over the whole vocabulary.
      prefix_counting, prefix_correct: slots whose steps 0..k all count, and of those the ones all right so far: what
        chain decoding accepts.
      prefix_accepted: over the same slots, the chance that all steps so far are accepted when tokens are drawn.
    """

    loss: jax.Array
    counting: jax.Array
    correct: jax.Array
    trained: jax.Array
    accepted: jax.Array
    prefix_counting: jax.Array
    prefix_correct: jax.Array
    prefix_accepted: jax.Array


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
    divisor_K: jax.Array | None = None,
    over: tuple[str, ...] = (),
    chunk_rows: int = CPU_CHUNK,
) -> tuple[jax.Array, Metrics]:
    """The scalar loss of the global batch and its figures; its gradient on a device is that of the device's own rows.

    Args:
      predictions: of `drafts.unroll`, at the live `slots`.
      features: greedy and lse must be there at every teacher position.
      lm_head_DW: the draft's own head, trained or not.
      teachers: the M positions of each row that teach some counting slot.
      slots: positions of the N live slots (for weighing by document).
      logits: what the target's family does to its logits.
      divisor_K: `divisors` of the whole batch, where `batch` is only a part of it.
      over: mesh axes over which a surrounding `shard_map` splits the rows.
      chunk_rows: slots whose logits exist at a time.

    Source: EAGLE-3 (arXiv 2503.01840); the switches of `spec` name the differences between its trainers.
    """
    index_V = _draft_entries(tables)
    label_BT = index_V[features.greedy_BT]
    label_KBN = jax.vmap(lambda read: take_rows(label_BT, jnp.minimum(read, label_BT.shape[1] - 1)))(
        predictions.taught_by_KBN
    )
    counts_KBN = predictions.counts_KBN
    trained_KBN = counts_KBN & (label_KBN >= 0) if spec.mask_out_of_vocab else counts_KBN
    segments_BN = take_rows(batch.segments_BT, slots.positions_BN)
    if divisor_K is None:
        divisor_K = divisors(spec, trained_KBN, segments_BN, batch.tokens_BT.shape, over)
    scale_KBN = _scale(spec, trained_KBN, segments_BN, divisor_K, batch.tokens_BT.shape[1])
    decay_K = spec.decay ** jnp.arange(counts_KBN.shape[0], dtype=scale_KBN.dtype)
    weight_KBN = jnp.where(trained_KBN, scale_KBN * decay_K[:, None, None], 0.0)

    slot_BMK, present_BMK = _slot_of_teacher(predictions, teachers, label_BT.shape[1])
    source, teaches_BM = _source(features.teacher, teachers.positions_BN, index_V, len(tables.head_DH))
    present_BMK = present_BMK & teaches_BM[..., None]
    taught = Taught(
        source=source,
        head_DH=tables.head_DH,
        lse_BM=take_rows(features.lse_BT, teachers.positions_BN),
        label_BM=take_rows(label_BT, teachers.positions_BN),
        weight_BMK=jnp.where(present_BMK, _take(weight_KBN, slot_BMK), 0.0),
        slot_BMK=jnp.where(present_BMK, slot_BMK, weight_KBN.shape[2]),
    )
    chunk = _chunk(slot_BMK.shape, chunk_rows)
    recipe = Recipe(spec.terms(), spec.renormalised, dtype, chunk, logits, spec.temperature, spec.mixture)
    rest_K = jnp.zeros_like(decay_K)
    if needs_first_pass(recipe.terms):
        frozen = jax.lax.stop_gradient((predictions.hidden_KBNW, lm_head_DW, taught))
        _, first = chunked_loss(recipe._replace(terms=((1.0, "tv"),)), *frozen)
        found = first.accepted, present_BMK
        accepted, present = _by_slot(found, slot_BMK, present_BMK, counts_KBN.shape[2])
        carries = trained_KBN & (present > 0)
        terms, factors, rest_K = split(recipe.terms, accepted, carries, scale_KBN, spec.decay, spec.mixture, over)
        recipe = recipe._replace(terms=terms)
        taught = taught._replace(factors=tuple(f if f is None else _take(f, slot_BMK) for f in factors))
    loss, by_teacher = chunked_loss(recipe, predictions.hidden_KBNW, lm_head_DW, taught)
    by_slot = _by_slot(by_teacher, slot_BMK, present_BMK, counts_KBN.shape[2])
    metrics = _figures(by_slot, counts_KBN, trained_KBN, scale_KBN)
    metrics = metrics._replace(loss=metrics.loss + rest_K)
    return summed_over((loss + jnp.sum(decay_K * rest_K), metrics), over)


def _draft_entries(tables: Tables) -> jax.Array:
    """Each token as a draft vocabulary entry [V]; -1 where the draft cannot say it."""
    entries = tables.draft_to_target_D.shape[0]
    return jnp.full(tables.embed_VW.shape[0], -1, jnp.int32).at[tables.draft_to_target_D].set(jnp.arange(entries))


def _source(
    teacher: jax.Array | TopK, positions_BM: jax.Array, index_V: jax.Array, size: int
) -> tuple[jax.Array | Known, jax.Array]:
    """What teaches at M positions of each row, and whether it says anything of the draft's `size` tokens [B, M].

    A slot that is told nothing costs nothing and is never accepted; means count it all the same.
    """
    found = jax.tree.map(lambda x: take_rows(x, positions_BM), teacher)
    if not isinstance(found, TopK):
        return found, jnp.ones(positions_BM.shape, bool)
    entries_BMP = index_V[found.ids_BTP]
    known_BMP = entries_BMP >= 0
    return Known(jnp.where(known_BMP, entries_BMP, size), found.log_probs_BTP), known_BMP.any(axis=-1)


def divisors(
    spec: ObjectiveSpec,
    trained_KBX: jax.Array,
    segments_BX: jax.Array,
    shape: tuple[int, int],
    over: tuple[str, ...] = (),
) -> jax.Array:
    """What each step's loss is divided by, [K]: all slots, those that carry loss, or documents that have such.

    Args:
      trained_KBX: the slots that carry loss; segments_BX: their documents.
      shape: of the batch, [B, T]. over: as in `objective`.
    """
    if spec.normaliser == "all_slots":
        return jnp.full(len(trained_KBX), jnp.float32(summed_over(shape[0] * shape[1], over)))
    if spec.normaliser == "counting":
        # Dividing by the slots that count, dropped ones included, would let the vocabulary change the scale.
        return jnp.maximum(summed_over(trained_KBX.sum(axis=(1, 2)), over), 1).astype(jnp.float32)
    documents_KB = (_by_document(trained_KBX, segments_BX, shape[1]) > 0).sum(axis=2)
    return jnp.maximum(summed_over(documents_KB.sum(axis=1), over), 1).astype(jnp.float32)


def _scale(
    spec: ObjectiveSpec, trained_KBN: jax.Array, segments_BN: jax.Array, divisor_K: jax.Array, length: int
) -> jax.Array:
    """What each slot's loss is multiplied with before the decay: one number a step, but for "document"."""
    scale = jnp.broadcast_to((1.0 / divisor_K)[:, None, None], trained_KBN.shape)
    if spec.normaliser != "document":
        return scale
    counts_KBS = _by_document(trained_KBN, segments_BN, length)
    own_KBN = jax.vmap(take_rows, (0, None))(counts_KBS, segments_BN)
    return scale / jnp.maximum(own_KBN, 1)


def _by_document(trained_KBX: jax.Array, segments_BX: jax.Array, length: int) -> jax.Array:
    """How many slots carry loss in each document, [K, B, T + 1]."""

    def row(trained_X: jax.Array, segments_X: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(trained_X.astype(jnp.float32), segments_X, length + 1)

    return jax.vmap(jax.vmap(row), (0, None))(trained_KBX, segments_BX)


def _slot_of_teacher(predictions: Predictions, teachers: Selected, length: int) -> tuple[jax.Array, jax.Array]:
    """Which slot (index in N) each teacher position teaches at each step, and whether there is one: [B, M, K]."""
    steps, batch, width = predictions.counts_KBN.shape
    read = jnp.where(predictions.counts_KBN, predictions.taught_by_KBN, length)
    k, b = jnp.arange(steps)[:, None, None], jnp.arange(batch)[None, :, None]
    slot_BTK = jnp.full((batch, length, steps), width, jnp.int32).at[b, read, k].set(jnp.arange(width), mode="drop")
    slot_BMK = take_rows(slot_BTK, teachers.positions_BN)
    present = (slot_BMK < width) & teachers.live_BN[..., None]
    return jnp.where(present, slot_BMK, 0), present


def _take(array_KBNX: jax.Array, slot_BMK: jax.Array) -> jax.Array:
    return array_KBNX[places(slot_BMK)]


def _chunk(shape: tuple[int, ...], rows: int) -> int:
    """Of slots [B, M, K] by teacher, the largest divisor of M that keeps a chunk at so many rows of logits or fewer."""
    batch, width, steps = shape
    wanted = max(1, rows // (batch * steps))
    return max(d for d in range(1, min(wanted, width) + 1) if width % d == 0)


def _by_slot(by_teacher: Any, slot_BMK: jax.Array, present_BMK: jax.Array, width: int) -> Any:
    """Arrays [B, M, K] by teacher -> float32 [K, B, N] by slot, 0 where nothing is present."""
    batch, _, steps = slot_BMK.shape
    at = places(jnp.where(present_BMK, slot_BMK, width))

    def scatter(values: jax.Array) -> jax.Array:
        return jnp.zeros((steps, batch, width), jnp.float32).at[at].set(values, mode="drop")

    return jax.tree.map(scatter, by_teacher)


def _figures(by_slot: Slotwise, counts: jax.Array, trained: jax.Array, scale: jax.Array) -> Metrics:
    def total(values: jax.Array) -> jax.Array:
        return values.sum(axis=(1, 2), dtype=jnp.float32)

    prefix = jnp.cumprod(counts, axis=0, dtype=jnp.float32)
    reached = jnp.cumprod(by_slot.accepted * counts, axis=0)
    return Metrics(
        loss=total(jnp.where(trained, by_slot.loss * scale, 0.0)),
        counting=total(counts),
        correct=total(by_slot.correct * counts),
        trained=total(trained),
        accepted=total(jnp.where(trained, by_slot.accepted, 0.0)),
        prefix_counting=total(prefix),
        prefix_correct=total(jnp.cumprod(by_slot.correct * counts, axis=0)),
        prefix_accepted=total(reached),
    )
