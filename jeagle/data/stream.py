"""Rows in an order that depends on (seed, epoch) alone, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import grain
import numpy as np

from jeagle import align
from jeagle.data.pack import load_rows
from jeagle.errors import UserError
from jeagle.interfaces import Batch

_BLOCK = 1024  # rows whose slots are counted at a time


class RowStream:
    """Batches of packed rows by global step: the step number is its whole state.

    Attributes:
      rows: of the global batch. steps_per_epoch: rounded down, at least 1.
    """

    def __init__(self, folder: Path, batch_rows: int, seed: int, *, process_index: int = 0, process_count: int = 1):
        self._rows = load_rows(folder)
        total = len(self._rows.tokens_BT)
        if total == 0:
            raise UserError(f"{folder} holds no rows to train on: give more conversations.")
        if batch_rows % process_count:
            raise UserError(
                f"--train.batch-rows {batch_rows} does not divide over {process_count} processes: make it a multiple."
            )
        self.rows, self.steps_per_epoch = batch_rows, max(total // batch_rows, 1)
        share = batch_rows // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)
        self._order = grain.MapDataset.source(np.arange(total)).seed(seed).shuffle().repeat()
        self._live = np.zeros(0, np.int64)  # until count_live

    def row_numbers(self, step: int) -> np.ndarray:
        """Which rows the global batch of `step` holds."""
        return np.array([self._order[i] for i in range(step * self.rows, (step + 1) * self.rows)])

    def own_row_numbers(self, step: int) -> np.ndarray:
        """Which rows this process's share of the batch of `step` holds."""
        return self.row_numbers(step)[self._own]

    def batch(self, step: int) -> Batch:
        """This process's share of the batch of `step`."""
        numbers = self.own_row_numbers(step)
        return Batch(*(np.ascontiguousarray(array[numbers]) for array in self._rows))

    def count_live(self, steps: int, rule: align.SlotRule, *, cross_documents: bool) -> None:
        """Counts, once, the slots of each row that count at some TTT step, and the positions that teach them."""
        counted = []
        for start in range(0, len(self._rows.tokens_BT), _BLOCK):
            block = Batch(*(np.asarray(array[start : start + _BLOCK]) for array in self._rows))
            counts = align.counting_slots(block, steps, rule, cross_documents=cross_documents, xp=np)
            reads = align.read_positions(block.segments_BT, steps, cross_documents=cross_documents, xp=np)
            taught = align.teacher_positions(counts, reads, xp=np)
            counted.append(np.maximum(counts.any(axis=0).sum(axis=1), taught.sum(axis=1)))
        self._live = np.concatenate(counted)

    def widest(self, step: int) -> int:
        """The most live slots (or teacher positions) in any row of the global batch: the same on every process."""
        return int(self._live[self.row_numbers(step)].max())

    def most_live(self) -> int:
        """The most live slots (or teacher positions) in any row at all."""
        return int(self._live.max())
