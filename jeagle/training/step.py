"""One training step: the target's features, the draft's predictions over the TTT steps, the loss, the update.

All of it is one jitted program. `train_step` reads from top to bottom; what it calls stands below it in the same order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jeagle import align, drafts, objective, targets
from jeagle.features import StoredFeatures, decode_features
from jeagle.interfaces import PLAIN_LOGITS, Batch, Features, LogitShape, Tables
from jeagle.run.parameters import ALL_TRAINED, Trained
from jeagle.runtime.mesh import RULES, platform, replicated, row_parts
from jeagle.training.optimiser import moving_average, stop_frozen_gradients


class Program(NamedTuple):
    """What is static about a step.

    Attributes:
      target, draft: graphdefs of the two models; the target's is None where all features are read from a store.
      aux_layers: layer boundaries of the target whose hidden states the draft reads.
      objective: the switches of the loss.
      ttt_steps: K.
      dtype: of the draft's matrix products.
      logits: what the target's family does to its logits, which are the teacher's.
      parts: how many parts the rows of a batch are divided into; the parts are computed one after the other and their
        gradients are accumulated.
      average: decay of the moving average of parameters; 0 keeps none.
      mesh: over which rows, parameters and gradients are split; None for one device.
      remat: the products of the TTT steps are computed again in the backward pass: less memory for more FLOPs.
      trained: which of the draft's parameters are trained.
      top_k: how many of the likeliest tokens of the target's distributions the loss is computed from, as in a store
        that holds no more of them; 0 for the whole distribution.
      attention: backend of the attention to step-0 keys; None takes the platform's.
    """

    target: Any
    draft: Any
    aux_layers: tuple[int, ...]
    objective: objective.ObjectiveSpec
    ttt_steps: int
    dtype: Any
    logits: LogitShape = PLAIN_LOGITS
    parts: int = 1
    average: float = 0.0
    mesh: Mesh | None = None
    remat: bool = False
    trained: Trained = ALL_TRAINED
    top_k: int = 0
    attention: drafts.Backend | None = None


class Frozen(NamedTuple):
    """Arrays that a step reads and never changes: the target's state, and its tables."""

    target: Any
    tables: Tables


class TrainState(NamedTuple):
    """All that training changes. Parameters, moments and the moving average (None where there is none) are float32."""

    draft: Any
    optimiser: Any
    step: jax.Array
    skipped: jax.Array
    average: Any = None


class StepReport(NamedTuple):
    """What a step reports.

    Attributes:
      loss: scalar. metrics: of the objective, by TTT step. gradient_norm: global, before clipping.
      taken: whether the update was applied. skipped: how many updates have not been applied so far.
    """

    loss: jax.Array
    metrics: objective.Metrics
    gradient_norm: jax.Array
    taken: jax.Array
    skipped: jax.Array


class LiveSlots(NamedTuple):
    """Where a batch needs work.

    Attributes:
      counts_KBT: whether slot t counts at TTT step k.
      slots: the slots that count at any step. teachers: the positions whose target distributions teach them.
    """

    counts_KBT: jax.Array
    slots: align.Selected
    teachers: align.Selected


@functools.partial(jax.jit, static_argnames=("program", "optimiser", "width"), donate_argnames=("state",))
def train_step(
    program: Program,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    width: int,
    stored: StoredFeatures | None = None,
) -> tuple[TrainState, StepReport]:
    """One optimiser step; `state` is donated.

    Args:
      width: N, to which live slots are gathered; at least `RowStream.widest` of this batch.
      stored: the batch's features as a store holds them; None where the target computes them.
    """

    return update(program, optimiser, state, *loss_gradient(program, state.draft, frozen, batch, width, stored))


LossAndGradient = tuple[tuple[jax.Array, objective.Metrics], Any]


def loss_gradient(
    program: Program, draft: Any, frozen: Frozen, batch: Batch, width: int, stored: StoredFeatures | None = None
) -> LossAndGradient:
    """((loss, metrics), gradient) of the draft on a batch; `width` and `stored` as in `train_step`."""

    def of_part(batch: Batch, stored: StoredFeatures | None, divisor_K: jax.Array | None) -> LossAndGradient:
        live = live_slots(program, batch, width)
        features = teacher_features(program, frozen, batch, live) if stored is None else decode_features(stored)

        def loss_of(draft: Any) -> tuple[jax.Array, objective.Metrics]:
            draft = stop_frozen_gradients(draft, program.trained)
            return draft_loss(program, draft, batch, features, frozen.tables, live, divisor_K)

        return jax.value_and_grad(loss_of, has_aux=True)(draft)

    return accumulated(program, of_part, batch, stored)


def live_slots(program: Program, batch: Batch, width: int) -> LiveSlots:
    """The live slots and teacher positions of a batch, gathered to `width`, which must suffice."""
    spec = program.objective
    counts = align.counting_slots(batch, program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    reads = align.read_positions(batch.segments_BT, program.ttt_steps, cross_documents=spec.cross_documents)
    taught = align.teacher_positions(counts, reads)
    return LiveSlots(counts, align.select(counts.any(axis=0), width), align.select(taught, width))


def teacher_features(program: Program, frozen: Frozen, batch: Batch, live: LiveSlots) -> Features:
    """The frozen target's features of a batch; its distributions only at the positions that teach."""
    target = nnx.merge(program.target, frozen.target)
    wanted_BT = jnp.zeros(batch.tokens_BT.shape, bool)
    rows_B1 = jnp.arange(wanted_BT.shape[0])[:, None]
    wanted_BT = wanted_BT.at[rows_B1, live.teachers.positions_BN].set(live.teachers.live_BN)
    width = live.teachers.positions_BN.shape[1]
    return jax.lax.stop_gradient(targets.features(target, batch, program.aux_layers, wanted_BT, width, program.top_k))


def draft_loss(
    program: Program,
    draft: Any,
    batch: Batch,
    features: Features,
    tables: Tables,
    live: LiveSlots,
    divisor_K: jax.Array | None = None,
) -> tuple[jax.Array, objective.Metrics]:
    """The loss of a draft on features, and its metrics.

    Where a mesh splits the batch's rows, each device runs the TTT steps and the loss of its own rows: the draft's
    parameters are gathered once a step, and their gradients summed over the devices once, not in every loop.

    Args:
      divisor_K: of `objective.divisors`, where this batch is a part of a larger one.
    """
    mesh = program.mesh
    split = mesh is not None and row_parts(mesh) > 1
    rows_axes = tuple(RULES["rows"]) if split else ()

    def loss_of_rows(draft, batch, features, embedded_BTW, tables, live, divisor_K):
        predictions = drafts.unroll(
            program.draft,
            draft,
            batch,
            features.aux_BTAH,
            embedded_BTW,
            live.slots,
            live.counts_KBT,
            cross_documents=program.objective.cross_documents,
            fixed_window=program.objective.fixed_window,
            remat=program.remat,
            chunk_mlp=mesh is None or mesh.shape["tensor"] == 1,
            backend=program.attention or drafts.attention_backend(mesh),
        )
        return objective.objective(
            program.objective,
            predictions,
            features,
            batch,
            tables,
            nnx.merge(program.draft, draft).lm_head[...],
            live.teachers,
            dtype=program.dtype,
            slots=live.slots,
            logits=program.logits,
            divisor_K=divisor_K,
            over=rows_axes,
            chunk_rows=objective.CPU_CHUNK if platform(mesh) == "cpu" else objective.ACCELERATOR_CHUNK,
        )

    if mesh is not None and split:
        whole, rows = PartitionSpec(), PartitionSpec(rows_axes)
        loss_of_rows = jax.shard_map(
            loss_of_rows,
            mesh=mesh,
            in_specs=(whole, rows, rows, rows, whole, LiveSlots(PartitionSpec(None, rows_axes), rows, rows), whole),
            out_specs=whole,
            axis_names={*rows_axes, *(axis for axis, size in mesh.shape.items() if size == 1)},
            check_vma=False,
        )
    embedded_BTW = tables.embed_VW[batch.tokens_BT]
    return loss_of_rows(drafts.with_adapters(draft), batch, features, embedded_BTW, tables, live, divisor_K)


def accumulated(
    program: Program,
    gradient: Callable[[Batch, StoredFeatures | None, jax.Array | None], LossAndGradient],
    batch: Batch,
    stored: StoredFeatures | None,
) -> LossAndGradient:
    """`gradient` of the whole batch, computed in `program.parts` parts of its rows one after the other.

    Each part's loss is divided by what the whole batch's is divided by, so that the sum is the whole batch's. Parts
    take every `parts`-th row, so that rows that lie on different devices stay there.
    """
    if program.parts == 1:
        return gradient(batch, stored, None)
    spec = program.objective
    counts = align.counting_slots(batch, program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    divisor_K = objective.divisors(spec, counts, batch.segments_BT, batch.tokens_BT.shape)
    parts = jax.tree.map(lambda x: x.reshape(-1, program.parts, *x.shape[1:]).swapaxes(0, 1), (batch, stored))

    def add(total: LossAndGradient, part: tuple[Batch, StoredFeatures | None]) -> tuple[LossAndGradient, None]:
        batch, stored = part
        return jax.tree.map(jnp.add, total, gradient(batch, stored, divisor_K)), None

    first_batch, first_stored = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: gradient(first_batch, first_stored, divisor_K))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)[0]


def update(
    program: Program,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    loss_and_metrics: tuple[jax.Array, objective.Metrics],
    gradient: Any,
) -> tuple[TrainState, StepReport]:
    """The optimiser's update. If loss or gradient is not finite, or no slot is trained, the update is skipped: the
    old parameters stay, and one more is counted as skipped."""
    loss, metrics = loss_and_metrics
    gradient = drafts.constrain_draft(gradient, program.mesh)
    norm = optax.tree.norm(gradient)
    taken = jnp.isfinite(norm) & jnp.isfinite(loss) & (metrics.trained.sum() > 0)

    def take(gradient: Any, old: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        draft, moments, average = old
        updates, moments = optimiser.update(gradient, moments, draft)
        draft = optax.apply_updates(draft, updates)
        return draft, moments, None if average is None else moving_average(average, draft, state.step, program.average)

    # Choosing leaf by leaf between old and new would keep both, a second copy of parameters and moments.
    old = state.draft, state.optimiser, state.average
    draft, moments, average = jax.lax.cond(taken, take, lambda _, old: old, gradient, old)
    draft = drafts.constrain_draft(draft, program.mesh)
    after = TrainState(draft, moments, state.step + 1, state.skipped + ~taken, average)
    return after, StepReport(loss, metrics, norm, taken, after.skipped)


@functools.partial(jax.jit, static_argnames=("program", "width"))
def evaluation_step(
    program: Program, draft: Any, frozen: Frozen, batch: Batch, width: int, stored: StoredFeatures | None = None
) -> objective.Metrics:
    """The metrics of a draft on rows that it is not trained on; `stored` and `width` as in `train_step`."""
    live = live_slots(program, batch, width)
    features = teacher_features(program, frozen, batch, live) if stored is None else decode_features(stored)
    return draft_loss(program, draft, batch, features, frozen.tables, live)[1]


def first_state(draft: Any, optimiser: optax.GradientTransformation, mesh: Mesh, *, average: float = 0.0) -> TrainState:
    """The state before the first step; moments, and the moving average if `average` is above 0, lie where the
    parameters lie."""
    everywhere = replicated(mesh)
    zero = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
    moments = jax.tree.map(
        lambda x: x if isinstance(getattr(x, "sharding", None), NamedSharding) else jax.device_put(x, everywhere),
        optimiser.init(draft),
    )
    return TrainState(draft, moments, zero, jnp.copy(zero), jax.tree.map(jnp.copy, draft) if average else None)
