"""jeagle's loss of a trained draft on a row of its data, and that row as the speculators library reads it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jeagle import data, objective
from jeagle.interfaces import Batch, DraftSpec
from jeagle.run import assemble
from jeagle.targets import Target
from jeagle.training.step import Frozen, Program, draft_loss, live_slots, teacher_features
from tests.serve.reference import open_run

TTT_STEPS = 3


class SameLoss(NamedTuple):
    """A row's loss in the dialect of speculators.

    Attributes:
      loss: all steps' together. by_step: each step's. counting: how many slots each step counts.
      arrays: the row's documents one after the other, and their lengths: what speculators' data set hands out.
    """

    loss: float
    by_step: list[float]
    counting: list[int]
    arrays: dict[str, np.ndarray]


def on_first_row(run: Path) -> SameLoss:
    """Of the first training row, in float32."""
    _, spec, opened = open_run(run)
    batch = Batch(*(jnp.asarray(array[:1]) for array in data.load_rows(run / "data" / "train")))
    graphdef, _ = assemble.draft_from_flat(spec, "float32", assemble.flat_draft(opened.weights.draft), opened.mesh)
    target = opened.loaded.target
    learnt = objective.resolve("speculators")
    program = Program(target.graphdef, graphdef, spec.aux_layers, learnt, TTT_STEPS, jnp.float32, target.spec.logits)
    live = live_slots(program, batch, batch.tokens_BT.shape[1])
    tables = opened.weights.tables
    found = teacher_features(program, Frozen(target.state, tables), batch, live)
    loss, metrics = draft_loss(program, opened.weights.draft, batch, found, tables, live)
    return SameLoss(
        float(loss), np.asarray(metrics.loss).tolist(), np.asarray(metrics.counting).tolist(), raw(target, spec, batch)
    )


def raw(target: Target, spec: DraftSpec, batch: Batch) -> dict[str, np.ndarray]:
    """The row in speculators' form: tapped streams side by side, and the last one before the final norm."""
    layers = (*spec.aux_layers, target.spec.layers)
    aux_BTAH, _ = target.model().forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, layers)
    tokens, segments, _, supervised = (np.asarray(array[0]) for array in batch)
    states = np.asarray(aux_BTAH[0], np.float32)
    real = segments > 0
    return {
        "input_ids": tokens[real].astype(np.int64),
        "loss_mask": supervised[real].astype(np.int64),
        "hidden_states": states[real, :-1].reshape(real.sum(), -1),
        "verifier_last_hidden_states": states[real, -1],
        "lengths": np.bincount(segments[real])[1:],
    }
