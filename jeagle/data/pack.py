"""Documents -> rows of one length, first-fit, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from jeagle.data.render import Rendered
from jeagle.interfaces import Batch

OPEN_ROWS = 64  # rows that are tried for room at a time: bounds memory and search

_FILES = {"tokens": np.int32, "segments": np.int32, "positions": np.int32, "supervised": np.bool_}
Long = Literal["cut", "split", "drop"]


@dataclasses.dataclass
class Packed:
    """Rows [R, T], and what happened on the way.

    Attributes:
      rows: tokens, segments, positions int32 and supervised bool, as `joints.Batch` describes them.
      truncated: documents cut to a row's length. split: cut into several. dropped: left out for their length.
      unsupervised: documents dropped since nothing in them is learnt.
    """

    rows: Batch
    truncated: int
    unsupervised: int
    split: int = 0
    dropped: int = 0


class Packer:
    """First-fit over a bounded number of open rows; full ones come out as they close.

    Attributes:
      truncated, split, dropped: documents longer than a row, by what became of them: cut to its length, continued in
        further documents that do not see what came before, or left out.
      unsupervised: documents left out since nothing in them is learnt.
    """

    def __init__(self, row_length: int, long: Long = "cut"):
        self._row_length, self._long = row_length, long
        self._rows: list[list[Rendered]] = []
        self._room: list[int] = []
        self.truncated = self.split = self.dropped = self.unsupervised = 0

    def add(self, document: Rendered) -> Iterator[list[Rendered]]:
        """Takes a document; yields the documents of each row that closes for it."""
        pieces = self._pieces(document)
        learnt = [piece for piece in pieces if piece.supervised.any()]
        self.unsupervised += bool(pieces) and not learnt
        for piece in learnt:
            size = len(piece.ids)
            place = next((i for i, free in enumerate(self._room) if free >= size), None)
            if place is None:
                if len(self._rows) == OPEN_ROWS:
                    fullest = min(range(OPEN_ROWS), key=self._room.__getitem__)
                    self._room.pop(fullest)
                    yield self._rows.pop(fullest)
                self._rows.append([])
                self._room.append(self._row_length)
                place = len(self._rows) - 1
            self._rows[place].append(piece)
            self._room[place] -= size

    def finish(self) -> list[list[Rendered]]:
        """The rows that are still open."""
        rest, self._rows, self._room = self._rows, [], []
        return rest

    def _pieces(self, document: Rendered) -> list[Rendered]:
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


def pack(documents: Iterable[Rendered], row_length: int, long: Long = "cut") -> Packed:
    """All the documents' rows in memory, by `Packer`."""
    packer = Packer(row_length, long)
    groups = [group for document in documents for group in packer.add(document)] + packer.finish()
    rows = rows_of(groups, row_length)
    return Packed(rows, packer.truncated, packer.unsupervised, packer.split, packer.dropped)


def rows_of(groups: list[list[Rendered]], row_length: int) -> Batch:
    """Rows [R, T] of the documents of each."""
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
    """The documents of packed rows, row by row."""
    documents = []
    for tokens, segments, _, supervised in zip(*rows, strict=True):
        for number in range(1, int(segments.max(initial=0)) + 1):
            here = segments == number
            documents.append(Rendered(tokens[here], supervised[here]))
    return documents


class RowWriter:
    """Rows onto disk as they come: one .npy file for each array, whose lengths are filled in at the end."""

    def __init__(self, folder: Path, row_length: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self._row_length = 0, row_length
        self._files = {name: open(folder / f"{name}.npy", "wb") for name in _FILES}  # noqa: SIM115
        self._headers()

    def write(self, rows: Batch) -> None:
        """Appends rows [R, T]."""
        for (name, kind), array in zip(_FILES.items(), rows, strict=True):
            self._files[name].write(np.ascontiguousarray(array, kind).data)
        self.rows += len(rows.tokens_BT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Fills in the lengths. Calling it again does nothing."""
        if not next(iter(self._files.values())).closed:
            self._headers()
        for file in self._files.values():
            file.close()

    def _headers(self) -> None:
        # numpy leaves room in a header for its first axis to grow, so that the length of a header stays.
        for name, kind in _FILES.items():
            self._files[name].seek(0)
            header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (self.rows, self._row_length)}
            np.lib.format.write_array_header_1_0(self._files[name], header)


def save_rows(rows: Batch, folder: Path) -> None:
    """One .npy file for each array."""
    with RowWriter(folder, rows.tokens_BT.shape[1]) as writer:
        writer.write(rows)


def load_rows(folder: Path) -> Batch:
    """Memory-mapped rows. An empty file cannot be mapped, and is read."""
    arrays = []
    for name in _FILES:
        path = folder / f"{name}.npy"
        array = np.load(path, mmap_mode="r") if path.stat().st_size > 256 else np.load(path)
        arrays.append(array)
    return Batch(*arrays)
