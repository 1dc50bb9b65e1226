"""What a draft does on rows that it is not trained on, at each checkpoint."""

import dataclasses
from typing import Any, Self

import jax
import numpy as np

from jeagle import data, features
from jeagle.interfaces import Batch
from jeagle.run.draft_init import BEST_BY, HELD_OUT
from jeagle.run.parameters import served_draft
from jeagle.runtime import distributed
from jeagle.runtime.ahead import read_ahead
from jeagle.runtime.trackers import Trackers, open_trackers
from jeagle.training.setup import Run, put_rows
from jeagle.training.step import Program, TrainState, evaluation_step


class HeldOut:
    """Evaluates the draft on --train.held-out-rows held-out rows, into held_out/metrics.jsonl of the run's folder.

    They lie evenly over all of them, the same at every checkpoint and on any number of processes. Without any, or
    with 0 asked for, nothing is read and nothing done.

    Args:
      start: the last step whose metrics stay.
      scores: of the steps that have been evaluated, by step; those after `start` go, those of later ones are added.
    """

    def __init__(self, run: Run, start: int, scores: dict[int, float]):
        config, program = run.config, run.program
        # Divided by the slots that count, whose number adds up over batches, whatever the dialect divides by.
        measured = dataclasses.replace(program.objective, normaliser="counting")
        self._program, self._frozen, self._stores = program._replace(objective=measured), run.frozen, run.stores
        self._check_target, self._mesh, self._size = (
            run.check_target,
            run.mesh,
            config.train.batch_rows // config.train.accumulate,
        )
        self._numbers, self._trackers, self._scores = np.arange(0), Trackers([]), scores
        for later in [step for step in scores if step > start]:  # of steps that are taken anew
            del scores[later]
        if not config.train.held_out_rows:
            return
        self._rows = data.load_rows(config.folder / "data" / "held_out", len(run.frozen.tables.embed_VW))
        self._numbers = spread(len(self._rows.tokens_BT), config.train.held_out_rows)
        self._width = _width(self._rows, self._numbers, program)
        if distributed.is_leader() and self._numbers.size:
            self._trackers = open_trackers(config.trackers, config.folder / HELD_OUT, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._trackers.close()

    def __call__(self, step: int, state: TrainState) -> str:
        """Logs the figures of the draft that would be exported, and puts them in words; empty without rows."""
        if not self._numbers.size:
            return ""
        metrics = self._summed(served_draft(state.draft, state.optimiser, state.average))
        accuracy = metrics["correct"] / np.maximum(metrics["counting"], 1)
        acceptance = metrics["accepted"] / np.maximum(metrics["trained"], 1)
        named = {"accuracy": accuracy, "acceptance": acceptance, "loss": metrics["loss"]}
        found = {f"{name}_{k}": float(v) for name, values in named.items() for k, v in enumerate(values)}
        found[BEST_BY] = float(1 + np.cumprod(accuracy).sum())
        self._trackers.log(step, found)
        self._scores[step] = found[BEST_BY]
        return (
            f"held out, step {step}: accuracy {' '.join(f'{x:.3f}' for x in accuracy)}, expected acceptance length "
            f"{found[BEST_BY]:.3f} over {len(self._numbers)} rows"
        )

    def again(self, step: int, state: TrainState) -> str:
        """As a call, of a step that a run goes on from; empty where that was evaluated before the run was cut off.

        All processes evaluate or none does, also where one does not see yet what the leader had written.
        """
        return self(step, state) if distributed.anywhere(step not in self._scores) else ""

    def _summed(self, draft: Any) -> dict[str, np.ndarray]:
        """Sums of every figure over the rows; the loss is the mean over the slots that carry it."""
        total: dict[str, np.ndarray] = {}
        starts = range(0, len(self._numbers), self._size)
        for both in read_ahead(starts, self._read, threads=1, depth=2):
            batch, stored = put_rows(both, self._mesh)
            found = evaluation_step(self._program, draft, self._frozen, batch, self._width, stored)
            metrics = jax.device_get(found)._asdict()
            if not np.isfinite(metrics["loss"]).all():
                self._check_target(batch)
            metrics["loss"] = metrics["loss"] * metrics["trained"]
            total = {name: total.get(name, 0.0) + np.asarray(value, np.float64) for name, value in metrics.items()}
        return total | {"loss": total["loss"] / np.maximum(total["trained"], 1)}

    def _read(self, start: int) -> tuple[Batch, features.StoredFeatures | None]:
        """This process's share of the rows from `start` on; what fills the last batch up teaches nothing."""
        share = self._size // jax.process_count()
        places = start + np.arange(self._size)
        everyone = self._numbers[np.minimum(places, len(self._numbers) - 1)]
        here = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        own, stored = everyone[here], None
        rows = Batch(*(np.ascontiguousarray(array[own]) for array in self._rows))
        if self._stores and self._stores.has_all("held_out", everyone):
            stored = self._stores.stored("held_out", own, rows)
        return rows._replace(supervised_BT=rows.supervised_BT & (places[here] < len(self._numbers))[:, None]), stored


def spread(total: int, most: int) -> np.ndarray:
    """At most `most` of `total` row numbers, rising, evenly apart."""
    count = min(total, most)
    return np.arange(count) * total // max(count, 1)


def _width(rows: Batch, numbers: np.ndarray, program: Program) -> int:
    """The most live slots, or positions that teach them, of any of these rows."""
    spec, steps = program.objective, program.ttt_steps
    counts = data.live_counts(rows, numbers, steps, spec.slots, cross_documents=spec.cross_documents)
    most = int(counts.max(initial=1))
    return min(-(-most // 16) * 16, rows.tokens_BT.shape[1])
