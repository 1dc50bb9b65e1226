"""Rows of one length: documents are packed into them by first fit, and they are stored on disk and read in batches.

The order in which they are read depends on the seed and the epoch alone, for any number of processes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Int64

from jeagle import align
from jeagle.data.chat.render import Rendered
from jeagle.errors import UserError
from jeagle.interfaces import Batch

OPEN_ROWS = 64  # rows that may still take documents; bounds the memory and the time of the search
_BLOCK = 1024  # rows whose slots are counted together
_DTYPES = {"tokens": np.int32, "segments": np.int32, "positions": np.int32, "supervised": np.bool_}
LongDocuments = Literal["cut", "split", "drop"]


@dataclasses.dataclass
class _OpenRow:
    free: int
    documents: list[Rendered]


class Packer:
    """Packs documents by first fit into a bounded number of open rows, and gives out rows as they close.

    Args:
      row_length: T, tokens per row.
      long: what happens to a document that is longer than a row: "cut" shortens it to T tokens, "split" continues it
        in further documents that do not attend to the earlier ones, and "drop" drops it.

    Attributes:
      truncated, split, dropped: number of long documents that were cut, split and dropped.
      unsupervised: number of documents that were dropped because no token of them is supervised.
    """

    def __init__(self, row_length: int, long: LongDocuments = "cut"):
        self._row_length, self._long = row_length, long
        self._rows: list[_OpenRow] = []
        self.truncated = self.split = self.dropped = self.unsupervised = 0

    def add(self, document: Rendered) -> Iterator[list[Rendered]]:
        """Adds a document, and yields the documents of each row that is closed to make room for it."""
        parts = self._parts(document)
        supervised = [part for part in parts if part.supervised.any()]
        self.unsupervised += bool(parts) and not supervised
        for part in supervised:
            size = len(part.ids)
            row = next((row for row in self._rows if row.free >= size), None)
            if row is None:
                if len(self._rows) == OPEN_ROWS:
                    fullest = min(range(OPEN_ROWS), key=lambda i: self._rows[i].free)
                    yield self._rows.pop(fullest).documents
                row = _OpenRow(self._row_length, [])
                self._rows.append(row)
            row.documents.append(part)
            row.free -= size

    def finish(self) -> list[list[Rendered]]:
        """Closes all open rows and returns the documents of each."""
        rest, self._rows = [row.documents for row in self._rows], []
        return rest

    def _parts(self, document: Rendered) -> list[Rendered]:
        length = self._row_length
        if len(document.ids) <= length:
            return [document]
        if self._long == "drop":
            self.dropped += 1
            return []
        if self._long == "cut":
            self.truncated += 1
            return [Rendered(document.ids[:length], document.supervised[:length])]
        self.split += 1
        starts = range(0, len(document.ids), length)
        return [Rendered(document.ids[i : i + length], document.supervised[i : i + length]) for i in starts]


def rows_of(groups: Sequence[Sequence[Rendered]], row_length: int) -> Batch:
    """Builds rows from groups of documents.

    Args:
      groups: the documents of each of the B rows; together they have at most T tokens.
      row_length: T.

    Returns:
      Rows [B, T] as numpy arrays, with documents numbered from 1 and padding at the end.
    """
    shape = (len(groups), row_length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    supervised = np.zeros(shape, bool)
    for row, group in enumerate(groups):
        start = 0
        for number, document in enumerate(group, 1):
            here = slice(start, start + len(document.ids))
            tokens[row, here], supervised[row, here] = document.ids, document.supervised
            segments[row, here], positions[row, here] = number, np.arange(len(document.ids))
            start = here.stop
    return Batch(tokens, segments, positions, supervised)


def unpack(rows: Batch) -> list[Rendered]:
    """Returns the documents of packed rows [B, T], row by row."""
    documents = []
    for tokens, segments, _, supervised in zip(*rows, strict=True):
        for number in range(1, int(segments.max(initial=0)) + 1):
            here = segments == number
            documents.append(Rendered(tokens[here], supervised[here]))
    return documents


class RowWriter:
    """Appends rows to files on disk, one .npy file per array; the number of rows is filled in at the end."""

    def __init__(self, folder: Path, row_length: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.row_length = 0, row_length
        self._files = {name: open(folder / f"{name}.npy", "wb") for name in _DTYPES}  # noqa: SIM115
        self._write_headers()  # which keep their place until the number of rows is known

    def write(self, rows: Batch) -> None:
        """Appends rows [B, T]."""
        for (name, dtype), array in zip(_DTYPES.items(), rows, strict=True):
            self._files[name].write(np.ascontiguousarray(array, dtype).data)
        self.rows += len(rows.tokens_BT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._write_headers()
        for file in self._files.values():
            file.close()

    def _write_headers(self) -> None:
        # numpy pads a header so that its first axis can grow, and so the header keeps its length.
        for name, dtype in _DTYPES.items():
            self._files[name].seek(0)
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (self.rows, self.row_length)}
            np.lib.format.write_array_header_1_0(self._files[name], header)


def load_rows(folder: Path) -> Batch:
    """Loads rows [R, T] as memory-mapped arrays. A file without rows is read, because it cannot be mapped."""
    paths = [folder / f"{name}.npy" for name in _DTYPES]
    return Batch(*(np.load(path, mmap_mode="r" if path.stat().st_size > 256 else None) for path in paths))


def live_counts(
    rows: Batch, numbers: np.ndarray, steps: int, rule: align.SlotRule, *, cross_documents: bool
) -> np.ndarray:
    """The live slots, or the positions that teach them if these are more, of each row in `numbers`: int64 [R].

    Args:
      steps: K, TTT steps.
      rule, cross_documents: which slots count, as `align.counting_slots` takes them.
    """
    counted = [np.zeros(0, np.int64)]
    for start in range(0, len(numbers), _BLOCK):
        block = Batch(*(np.asarray(array[numbers[start : start + _BLOCK]]) for array in rows))
        counts = align.counting_slots(block, steps, rule, cross_documents=cross_documents, xp=np)
        reads = align.read_positions(block.segments_BT, steps, cross_documents=cross_documents, xp=np)
        taught = align.teacher_positions(counts, reads, xp=np)
        counted.append(np.maximum(counts.any(axis=0).sum(axis=1), taught.sum(axis=1)))
    return np.concatenate(counted)


def _shuffled(total: int, seed: int, epoch: int) -> Int64[np.ndarray, " R"]:
    """The order of the rows in an epoch: by numbers of Philox, whose raw output is the same in every version of NumPy."""
    return np.argsort(np.random.Philox(key=[seed % 2**64, epoch]).random_raw(total), kind="stable")


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
        self._order = functools.lru_cache(2)(functools.partial(_shuffled, total, seed))
        self._live = np.zeros(0, np.int64)  # until count_live is called

    def row_numbers(self, step: int) -> Int64[np.ndarray, " B"]:
        """Returns which rows the global batch of `step` contains."""
        total = len(self._rows.tokens_BT)
        entries = range(step * self.rows, (step + 1) * self.rows)
        return np.array([self._order(entry // total)[entry % total] for entry in entries])

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
        every = np.arange(len(self._rows.tokens_BT))
        self._live = live_counts(self._rows, every, steps, rule, cross_documents=cross_documents)

    def widest(self, step: int) -> int:
        """Returns the most live slots (or teacher positions) in any row of the global batch, on every process."""
        return int(self._live[self.row_numbers(step)].max())

    def most_live(self) -> int:
        """Returns the most live slots (or teacher positions) in any row at all."""
        return int(self._live.max())
