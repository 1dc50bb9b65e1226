"""Reads batches of rows in an order that depends on the seed and the epoch alone, for any number of processes."""

from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int64

from jeagle import align
from jeagle.data.packing import load_rows
from jeagle.errors import UserError
from jeagle.interfaces import Batch

_BLOCK = 1024  # rows whose slots are counted together


class RowStream:
    """Batches of packed rows by global step; the step number is the whole state of the stream.

    Args:
      folder: rows as `RowWriter` stores them.
      batch_rows: B, rows of the global batch.
      seed: seed of the shuffling.
      process_index, process_count: which share of a global batch this process reads.

    Attributes:
      rows: B.
      steps_per_epoch: rounded down, but at least 1.

    Raises:
      UserError: if the folder has no rows, or if B is not a multiple of the number of processes.
    """

    def __init__(self, folder: Path, batch_rows: int, seed: int, *, process_index: int = 0, process_count: int = 1):
        self._rows = load_rows(folder)
        total = len(self._rows.tokens_BT)
        if total == 0:
            raise UserError(f"{folder} has no rows to train on: give more conversations.")
        if batch_rows % process_count:
            raise UserError(
                f"--train.batch-rows {batch_rows} is not a multiple of the number of processes, {process_count}: make "
                "it a multiple."
            )
        self.rows, self.steps_per_epoch = batch_rows, max(total // batch_rows, 1)
        share = batch_rows // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)
        self._order = grain.MapDataset.source(np.arange(total)).seed(seed).shuffle().repeat()
        self._live = np.zeros(0, np.int64)  # until count_live is called

    def row_numbers(self, step: int) -> Int64[np.ndarray, " B"]:
        """Returns which rows the global batch of `step` contains."""
        return np.array([self._order[i] for i in range(step * self.rows, (step + 1) * self.rows)])

    def own_row_numbers(self, step: int) -> Int64[np.ndarray, " b"]:
        """Returns which rows this process's share of the batch of `step` contains."""
        return self.row_numbers(step)[self._own]

    def batch(self, step: int) -> Batch:
        """Returns this process's share of the batch of `step`."""
        numbers = self.own_row_numbers(step)
        return Batch(*(np.ascontiguousarray(array[numbers]) for array in self._rows))

    def count_live(self, steps: int, rule: align.SlotRule, *, cross_documents: bool) -> None:
        """Counts for each row the slots that count at any TTT step, and the positions that teach them.

        Call it once, before `widest` and `most_live`.

        Args:
          steps: K, TTT steps.
          rule, cross_documents: which slots count, as `align.counting_slots` takes them.
        """
        counted = []
        for start in range(0, len(self._rows.tokens_BT), _BLOCK):
            block = Batch(*(np.asarray(array[start : start + _BLOCK]) for array in self._rows))
            counts = align.counting_slots(block, steps, rule, cross_documents=cross_documents, xp=np)
            reads = align.read_positions(block.segments_BT, steps, cross_documents=cross_documents, xp=np)
            taught = align.teacher_positions(counts, reads, xp=np)
            counted.append(np.maximum(counts.any(axis=0).sum(axis=1), taught.sum(axis=1)))
        self._live = np.concatenate(counted)

    def widest(self, step: int) -> int:
        """Returns the most live slots (or teacher positions) in any row of the global batch, on every process."""
        return int(self._live[self.row_numbers(step)].max())

    def most_live(self) -> int:
        """Returns the most live slots (or teacher positions) in any row at all."""
        return int(self._live.max())
