"""Documents -> rows of one length, first-fit, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jeagle.data.render import Rendered
from jeagle.joints import Batch

OPEN_ROWS = 64  # rows that are tried for room at a time: bounds memory and search

_FILES = ("tokens", "segments", "positions", "supervised")


@dataclasses.dataclass
class Packed:
    """Rows [R, T], and what happened on the way.

    Attributes:
      rows: tokens, segments, positions int32 and supervised bool, as `joints.Batch` describes them.
      truncated: documents cut to a row's length.
      unsupervised: documents dropped since nothing in them is learnt.
    """

    rows: Batch
    truncated: int
    unsupervised: int


def pack(documents: Iterable[Rendered], row_length: int) -> Packed:
    """First-fit over a bounded number of open rows; a longer document is cut to the row's length, and counted."""
    closed: list[list[Rendered]] = []
    open_rows: list[list[Rendered]] = []
    room: list[int] = []
    truncated = unsupervised = 0
    for document in documents:
        if len(document.ids) > row_length:
            truncated += 1
            document = Rendered(document.ids[:row_length], document.supervised[:row_length])
        if not document.supervised.any():
            unsupervised += 1
            continue
        size = len(document.ids)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            if len(open_rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=room.__getitem__)
                closed.append(open_rows.pop(fullest))
                room.pop(fullest)
            open_rows.append([])
            room.append(row_length)
            place = len(open_rows) - 1
        open_rows[place].append(document)
        room[place] -= size
    return Packed(_rows(closed + open_rows, row_length), truncated, unsupervised)


def _rows(groups: list[list[Rendered]], row_length: int) -> Batch:
    shape = (len(groups), row_length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    supervised = np.zeros(shape, bool)
    for row, group in enumerate(groups):
        start = 0
        for number, document in enumerate(group, 1):
            here = slice(start, start + len(document.ids))
            tokens[row, here], supervised[row, here] = document
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


def save_rows(rows: Batch, folder: Path) -> None:
    """One .npy file for each array."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(_FILES, rows, strict=True):
        np.save(folder / f"{name}.npy", array)


def load_rows(folder: Path) -> Batch:
    """Memory-mapped rows."""
    return Batch(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES))
