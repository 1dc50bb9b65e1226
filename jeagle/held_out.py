"""What a draft does on the held-out rows of its stores, while it is trained."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jeagle import align, data, features
from jeagle.config import RunConfig
from jeagle.forward import Program
from jeagle.joints import Batch, Tables
from jeagle.runtime import distributed
from jeagle.runtime.mesh import row_sharding
from jeagle.runtime.trackers import JsonlTracker
from jeagle.step import held_out_step


class HeldOut:
    """The held-out rows of a run's stores, evaluated at each checkpoint into held_out/metrics.jsonl of its folder.

    Does nothing for a run without stores.
    """

    def __init__(
        self,
        config: RunConfig,
        stores: features.Mixture | None,
        program: Program,
        tables: Tables,
        mesh: Mesh,
        start: int,
    ):
        self._config, self._stores, self._program, self._tables, self._mesh = config, stores, program, tables, mesh
        self._rows = data.load_rows(config.folder / "data" / "held_out")
        self.count = len(self._rows.tokens_BT) if stores else 0
        self._width = _width(self._rows, program) if self.count else 0
        self._tracker = None
        if distributed.is_leader() and self.count:
            (config.folder / "held_out").mkdir(exist_ok=True)
            self._tracker = JsonlTracker(config.folder / "held_out", start)

    def __call__(self, step: int, draft: Any) -> dict[str, float]:
        """The figures of all held-out rows, logged and printed; empty where there are none."""
        if not self.count:
            return {}
        figures = self._summed(draft)
        counted = np.maximum(figures["counting"], 1)
        accuracy = figures["correct"] / counted
        found = {f"accuracy_{k}": float(v) for k, v in enumerate(accuracy)}
        found |= {f"acceptance_{k}": float(v) for k, v in enumerate(figures["accepted"] / _some(figures["trained"]))}
        found |= {f"loss_{k}": float(v) for k, v in enumerate(figures["loss"])}
        found["expected_acceptance_length"] = float(1 + np.cumprod(accuracy).sum())
        if self._tracker:
            self._tracker.log(step, found)
            print(
                f"held out, step {step}: accuracy {' '.join(f'{x:.3f}' for x in accuracy)}, expected acceptance length "
                f"{found['expected_acceptance_length']:.3f} over {self.count} rows",
                flush=True,
            )
        return found

    def _summed(self, draft: Any) -> dict[str, np.ndarray]:
        """Sums of every figure over all rows; the loss is the mean over the slots that carry it."""
        size, sharding = self._config.train.batch_rows, row_sharding(self._mesh)
        share = size // jax.process_count()
        own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        total: dict[str, np.ndarray] = {}
        stores = self._stores
        assert stores is not None

        def read(start: int) -> tuple[Batch, features.Stored]:
            numbers = np.minimum(np.arange(start, start + size), self.count - 1)[own]
            real = np.arange(start, start + size)[own] < self.count
            rows = Batch(*(np.ascontiguousarray(array[numbers]) for array in self._rows))
            stored = stores.stored("held_out", numbers, rows)
            return rows._replace(supervised_BT=rows.supervised_BT & real[:, None]), stored

        for both in features.read_ahead(range(0, self.count, size), read, threads=1, depth=2):
            batch, stored = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), both)
            found = held_out_step(self._program, draft, self._tables, batch, self._width, stored)
            figures = jax.device_get(found)._asdict()
            figures["loss"] = figures["loss"] * figures["trained"]
            total = {name: total.get(name, 0.0) + np.asarray(value, np.float64) for name, value in figures.items()}
        return total | {"loss": total["loss"] / _some(total["trained"])}


def _some(count: np.ndarray) -> np.ndarray:
    return np.maximum(count, 1)


def _width(rows: Batch, program: Program) -> int:
    """The most live slots, or positions that teach them, of any row."""
    spec, most = program.objective, 1
    for start in range(0, len(rows.tokens_BT), 1024):
        block = Batch(*(np.asarray(array[start : start + 1024]) for array in rows))
        counts = align.counting_slots(block, program.ttt_steps, spec.slots, cross_documents=spec.cross_documents, xp=np)
        reads = align.read_positions(block.segments_BT, program.ttt_steps, cross_documents=spec.cross_documents, xp=np)
        taught = align.teacher_positions(counts, reads, xp=np)
        most = max(most, int(counts.any(axis=0).sum(axis=1).max()), int(taught.sum(axis=1).max()))
    return min(-(-most // 16) * 16, rows.tokens_BT.shape[1])
