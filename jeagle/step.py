"""The one jitted program: target -> draft -> objective -> update."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jeagle import align, drafts, objective, targets
from jeagle.assemble import TrainState
from jeagle.joints import PLAIN_LOGITS, Batch, Features, LogitShape, Tables


class Program(NamedTuple):
    """What is static about a step.

    Attributes:
      target, draft: graphdefs of the two models.
      taps: layer boundaries of the target that are fused.
      objective: the switches of the loss.
      ttt_steps: K.
      dtype: of the draft's matrix products.
      logits: what the target's family does to its logits, which teach.
    """

    target: Any
    draft: Any
    taps: tuple[int, ...]
    objective: objective.ObjectiveSpec
    ttt_steps: int
    dtype: Any
    logits: LogitShape = PLAIN_LOGITS


class Frozen(NamedTuple):
    """Arrays that a step reads and never changes."""

    target: Any
    tables: Tables


class Report(NamedTuple):
    """What a step tells: the loss, its figures, the gradient's norm, and whether the update was taken."""

    loss: jax.Array
    figures: objective.Figures
    gradient_norm: jax.Array
    taken: jax.Array


class Live(NamedTuple):
    """Where a batch needs work: which slots count at each step, the slots, and the positions that teach them."""

    counts_KBT: jax.Array
    slots: align.Selected
    teachers: align.Selected


def live_positions(program: Program, batch: Batch, width: int) -> Live:
    """The live slots and teacher positions of a batch, gathered to `width`, which must suffice."""
    spec = program.objective
    counts = align.counting_slots(batch, program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    reads = align.read_positions(batch.segments_BT, program.ttt_steps, cross_documents=spec.cross_documents)
    taught = align.teacher_positions(counts, reads)
    return Live(counts, align.select(counts.any(axis=0), width), align.select(taught, width))


def target_features(program: Program, frozen: Frozen, batch: Batch, live: Live) -> Features:
    """The frozen target's features of a batch."""
    model = nnx.merge(program.target, frozen.target)
    wanted = jnp.zeros(batch.tokens_BT.shape, bool)
    rows = jnp.arange(wanted.shape[0])[:, None]
    wanted = wanted.at[rows, live.teachers.positions_BN].set(live.teachers.live_BN)
    found = targets.features(model, batch, program.taps, wanted, live.teachers.positions_BN.shape[1])
    return jax.lax.stop_gradient(found)


def draft_loss(
    program: Program, draft: Any, batch: Batch, features: Features, tables: Tables, live: Live
) -> tuple[jax.Array, objective.Figures]:
    """The loss of a draft on features, and its figures."""
    cross = program.objective.cross_documents
    predictions = drafts.unroll(
        program.draft, draft, batch, features.taps_BTAH, tables, live.slots, live.counts_KBT, cross_documents=cross
    )
    head = nnx.merge(program.draft, draft).lm_head[...]
    return objective.objective(
        program.objective,
        predictions,
        features,
        batch,
        tables,
        head,
        live.teachers,
        dtype=program.dtype,
        slots=live.slots,
        logits=program.logits,
    )


@functools.partial(jax.jit, static_argnames=("program", "optimiser", "width"), donate_argnames=("state",))
def train_step(
    program: Program,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    width: int,
) -> tuple[TrainState, Report]:
    """One optimiser step; `state` is donated. An update that is not finite is not taken, and counted as skipped."""
    live = live_positions(program, batch, width)
    features = target_features(program, frozen, batch, live)

    def loss_of(draft: Any) -> tuple[jax.Array, objective.Figures]:
        return draft_loss(program, draft, batch, features, frozen.tables, live)

    (loss, figures), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.draft)
    norm = optax.tree.norm(gradient)
    updates, moments = optimiser.update(gradient, state.optimiser, state.draft)
    taken = jnp.isfinite(norm) & jnp.isfinite(loss) & (figures.trained.sum() > 0)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)

    after = TrainState(
        draft=keep(optax.apply_updates(state.draft, updates), state.draft),
        optimiser=keep(moments, state.optimiser),
        step=state.step + 1,
        skipped=state.skipped + ~taken,
    )
    return after, Report(loss, figures, norm, taken)
