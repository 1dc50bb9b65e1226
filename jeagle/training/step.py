"""The one jitted program: target -> draft -> objective -> update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jeagle import align, features, objective
from jeagle.drafts import constrain_draft
from jeagle.interfaces import Batch, Features
from jeagle.run.assemble import TrainState
from jeagle.training.forward import Frozen, Live, Program, draft_loss, live_positions, target_features
from jeagle.training.optimiser import averaged, held


class Report(NamedTuple):
    """What a step tells: the loss, its figures, the gradient's norm, whether the update was taken, and how many so far
    were not."""

    loss: jax.Array
    metrics: objective.Metrics
    gradient_norm: jax.Array
    taken: jax.Array
    skipped: jax.Array


@functools.partial(jax.jit, static_argnames=("program", "optimiser", "width"), donate_argnames=("state",))
def train_step(
    program: Program,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    width: int,
    stored: features.StoredFeatures | None = None,
) -> tuple[TrainState, Report]:
    """One optimiser step; `state` is donated. An update that is not finite is not taken, and counted as skipped.

    Args:
      stored: the batch's features out of a store; None where the target computes them.
    """
    if program.parts == 1:
        found = part_gradient(program, state.draft, frozen, batch, width, None, stored)
    else:
        found = summed_gradient(program, state.draft, frozen, batch, width, stored)
    return descend(optimiser, state, *found, average=program.average, mesh=program.mesh)


def part_gradient(
    program: Program,
    draft: Any,
    frozen: Frozen,
    batch: Batch,
    width: int,
    divisor_K: jax.Array | None = None,
    stored: features.StoredFeatures | None = None,
) -> tuple[tuple[jax.Array, objective.Metrics], Any]:
    """((loss, figures), gradient) of a batch, or of a part of one whose `objective.divisors` are given."""
    live = live_positions(program, batch, width)
    found = batch_features(program, frozen, batch, live, stored)

    def loss_of(draft: Any) -> tuple[jax.Array, objective.Metrics]:
        return draft_loss(program, held(draft, program.trained), batch, found, frozen.tables, live, divisor_K)

    return jax.value_and_grad(loss_of, has_aux=True)(draft)


def batch_features(
    program: Program, frozen: Frozen, batch: Batch, live: Live, stored: features.StoredFeatures | None
) -> Features:
    """The features of a batch: all of them out of a store, or, without `stored`, all of them computed by the target."""
    if stored is None:
        return target_features(program, frozen, batch, live)
    return features.decode_features(stored)


def summed_gradient(
    program: Program,
    draft: Any,
    frozen: Frozen,
    batch: Batch,
    width: int,
    stored: features.StoredFeatures | None = None,
) -> tuple[tuple[jax.Array, objective.Metrics], Any]:
    """As `part_gradient` of the whole batch, a part at a time: each divided by what the whole batch is divided by.

    Parts take every `parts`-th row, so that rows that lie on different devices stay there.
    """
    spec = program.objective
    counts = align.counting_slots(batch, program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    divisor_K = objective.divisors(spec, counts, batch.segments_BT, batch.tokens_BT.shape)
    parts = jax.tree.map(lambda x: x.reshape(-1, program.parts, *x.shape[1:]).swapaxes(0, 1), (batch, stored))

    def one(part: tuple[Batch, features.StoredFeatures | None]) -> Any:
        return part_gradient(program, draft, frozen, part[0], width, divisor_K, part[1])

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: one(_first(parts))))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), nothing, parts)
    return total


def _first(parts: Any) -> Any:
    return jax.tree.map(lambda x: x[0], parts)


def update(
    optimiser: optax.GradientTransformation,
    state: TrainState,
    loss_of: Callable[[Any], tuple[jax.Array, objective.Metrics]],
    mesh: Mesh | None = None,
) -> tuple[TrainState, Report]:
    """The optimiser's step down `loss_of` the draft."""
    return descend(optimiser, state, *jax.value_and_grad(loss_of, has_aux=True)(state.draft), mesh=mesh)


def descend(
    optimiser: optax.GradientTransformation,
    state: TrainState,
    found: tuple[jax.Array, objective.Metrics],
    gradient: Any,
    *,
    average: float = 0.0,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Report]:
    """The optimiser's step; the old state, one more skipped, if loss or gradient is not finite or no slot is trained.

    Args:
      found: loss and figures. average: decay of the moving average of parameters, where the state has one.
    """
    loss, metrics = found
    gradient = constrain_draft(gradient, mesh)
    norm = optax.tree.norm(gradient)
    taken = jnp.isfinite(norm) & jnp.isfinite(loss) & (metrics.trained.sum() > 0)

    def take(gradient: Any, old: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        draft, moments, mean = old
        updates, moments = optimiser.update(gradient, moments, draft)
        draft = optax.apply_updates(draft, updates)
        return draft, moments, None if mean is None else averaged(mean, draft, state.step, average)

    # Choosing leaf by leaf between old and new would keep both, a second copy of parameters and moments.
    old = state.draft, state.optimiser, state.average
    draft, moments, mean = jax.lax.cond(taken, take, lambda _, old: old, gradient, old)
    after = TrainState(
        draft=constrain_draft(draft, mesh),
        optimiser=moments,
        step=state.step + 1,
        skipped=state.skipped + ~taken,
        average=mean,
    )
    return after, Report(loss, metrics, norm, taken, after.skipped)


@functools.partial(jax.jit, static_argnames=("program", "width"))
def held_out_step(
    program: Program,
    draft: Any,
    frozen: Frozen,
    batch: Batch,
    width: int,
    stored: features.StoredFeatures | None = None,
) -> objective.Metrics:
    """What a draft does on rows that it is not trained on; `stored` and `width` as `train_step` has them."""
    live = live_positions(program, batch, width)
    found = batch_features(program, frozen, batch, live, stored)
    return draft_loss(program, draft, batch, found, frozen.tables, live)[1]
