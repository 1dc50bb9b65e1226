"""Rows in an order that depends on (seed, epoch) alone, whatever the number of processes."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np

from jeagle import align
from jeagle.data.pack import load_rows
from jeagle.errors import UserError
from jeagle.interfaces import Batch

_PREFETCH = 2
_BLOCK = 1024  # rows whose slots are counted at a time


class RowStream:
    """Batches of packed rows by global step: the step number is its whole state.

    Attributes:
      rows: of the global batch. steps_per_epoch: rounded down, at least 1.

    Args:
      shares: (rows, weight) of parts that follow one another in the folder and are drawn from in that proportion;
        None takes every row once an epoch.
    """

    def __init__(
        self,
        folder: Path,
        batch_rows: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        shares: Sequence[tuple[int, float]] | None = None,
    ):
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
        self._order = _order(total, seed, shares)
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

    def from_step(self, start: int, stop: int) -> Iterator[tuple[int, int, Batch]]:
        """(step, widest, batch) for start <= step < stop, read ahead on a thread, whose errors are raised here."""
        steps = iter(range(start, stop))
        with ThreadPoolExecutor(1, "rows") as reader:

            def read(count: int) -> list[Future]:
                return [reader.submit(self._item, step) for step in itertools.islice(steps, count)]

            waiting = collections.deque(read(_PREFETCH))
            try:
                while waiting:
                    item = waiting.popleft().result()
                    waiting.extend(read(1))
                    yield item
            finally:
                reader.shutdown(wait=False, cancel_futures=True)

    def _item(self, step: int) -> tuple[int, int, Batch]:
        return step, self.widest(step), self.batch(step)


def _order(total: int, seed: int, shares: Sequence[tuple[int, float]] | None) -> grain.MapDataset:
    """Row numbers without end: a shuffle an epoch, or one of each part, mixed."""

    def shuffled(start: int, stop: int) -> grain.MapDataset:
        return grain.MapDataset.source(np.arange(start, stop)).seed(seed).shuffle().repeat()

    if shares is None:
        return shuffled(0, total)
    ends = np.cumsum([rows for rows, _ in shares])
    parts = [shuffled(end - rows, end) for (rows, _), end in zip(shares, ends, strict=True)]
    return grain.MapDataset.mix(parts, [weight for _, weight in shares])
