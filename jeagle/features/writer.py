"""Writing a store: segments aside, then one manifest that makes each of them count."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jeagle.errors import UserError
from jeagle.features.arrays import metadata_sha256, write_array
from jeagle.features.claims import Claims
from jeagle.features.manifests import (
    CLAIMS,
    MANIFESTS,
    SEGMENTS,
    STORE,
    TABLES,
    Segment,
    check_fit,
    check_place,
    finished,
    read_store,
    sealed,
    write_index,
)
from jeagle.features.rows import Ragged
from jeagle.features.storage import Full, Place

POLL_SECONDS = 0.25


class Unit(NamedTuple):
    """Work that becomes one segment: some consecutive rows of one side of the split."""

    name: str
    split: str
    rows: range


def units_of(splits: dict[str, int], rows_each: int) -> list[Unit]:
    """All units of a store, in order: they depend on the data alone, never on who writes.

    Args:
      splits: rows of each side. rows_each: of a unit.
    """
    return [
        Unit(f"{split}-{start // rows_each:06d}", split, range(start, min(start + rows_each, rows)))
        for split, rows in splits.items()
        for start in range(0, rows, rows_each)
    ]


class Writer:
    """One of any number of writers of a store.

    Args:
      about: store.json of a store that is begun now; one that is there already must have the same `made_from`.

    Attributes:
      about: store.json as it lies there: its layout stands, whatever this writer would choose.
      bytes: written by this writer.

    Raises:
      UserError: for a store that was made from something else, with the fields named, or that is damaged.
    """

    def __init__(self, place: Place, about: dict[str, Any]):
        self.place, self.claims = place, Claims(place)
        check_place(place)
        place.write_new(STORE, sealed(about))
        self.about = read_store(place) or about
        doing = "Give another --out, or remove the old store."
        check_fit(place, about["made_from"], self.about["made_from"], doing)
        check_fit(place, self.about["made_from"], about["made_from"], doing)
        self.bytes = 0

    def pending(self, units: list[Unit]) -> list[Unit]:
        """Those that nobody has finished."""
        done = set(finished(self.place))
        return [unit for unit in units if unit.name not in done]

    def take(self, units: list[Unit], count: int = 1) -> list[Unit]:
        """Up to `count` units to make; waits while living writers hold all that are left. Empty: all are done."""
        while left := self.pending(units):
            taken: list[Unit] = []
            for unit in left:
                if len(taken) < count and self.take_one(unit):
                    taken.append(unit)
            if taken:
                return taken
            time.sleep(POLL_SECONDS)
        return []

    def take_one(self, unit: Unit) -> bool:
        """Whether this writer shall make the unit."""
        if not self.claims.take(unit.name):
            return False
        if unit.name in finished(self.place):
            self.claims.drop(unit.name)
            return False
        return True

    def commit(self, unit: Unit, found: Ragged, chunk: int) -> bool:
        """Writes a unit's rows; False where another writer was first.

        Raises:
          UserError: the disk is full; what was written of the unit is removed.
        """
        counts = tuple(found.lengths), tuple(found.kept), () if found.seen == found.lengths else tuple(found.seen)
        segment = Segment(unit.name, f"{unit.name}.{self.claims.writer}", unit.split, tuple(unit.rows), *counts)
        return self._commit(segment, found.arrays, chunk)

    def commit_tables(self, make: Callable[[], dict[str, np.ndarray]]) -> None:
        """Writes the arrays that belong to no row, unless they are there."""
        if TABLES not in finished(self.place):
            self._commit(Segment(TABLES, f"{TABLES}.{self.claims.writer}"), make(), 2**16)

    def finish(self) -> None:
        """Once all is there: the index; and what dead writers left is removed."""
        segments = write_index(self.place)
        named = {s.data for s in segments}
        for data in self.place.names(SEGMENTS):
            if data not in named:
                self.place.delete(f"{SEGMENTS}/{data}")
        for claim in self.place.names(CLAIMS):
            self.place.delete(f"{CLAIMS}/{claim}")
        self.place.sweep()

    def _commit(self, segment: Segment, arrays: dict[str, np.ndarray], chunk: int) -> bool:
        place, folder, size = self.place, segment.folder, sum(a.nbytes for a in arrays.values())
        try:
            free = place.free_bytes()
            if free is not None and free < size:  # before it is truly full, for whoever else writes there
                raise Full
            described = {name: write_array(place, f"{folder}/{name}", a, chunk) for name, a in arrays.items()}
            segment = dataclasses.replace(segment, arrays=described, bytes=size)
            whole = all(
                metadata_sha256(place, f"{folder}/{name}") == d["metadata_sha256"] for name, d in described.items()
            )
            seal = sealed(dataclasses.asdict(segment))
            first = whole and place.write_new(f"{MANIFESTS}/{segment.name}.json", seal)
        except Full as error:
            place.delete(folder)
            self.claims.drop_all()
            raise UserError(self._full(size, segment.name)) from error
        except BaseException:
            place.delete(folder)
            if segment.name in finished(place):  # another was first, and has removed this beginning
                return False
            raise
        if first:
            self.bytes += size
            self._sweep(segment)
        else:
            place.delete(folder)
        self.claims.drop(segment.name)
        return first

    def _full(self, needed: int, name: str) -> str:
        done = len(finished(self.place))
        return (
            f"The disk of {self.place} is full: segment {name} needs {needed / 1e6:,.3f} MB and "
            f"{(self.place.free_bytes() or 0) / 1e6:,.3f} MB are free. The {done} finished segments are safe: make "
            "room, and the same command goes on from them."
        )

    def _sweep(self, segment: Segment) -> None:
        """Removes other writers' beginnings of a segment that is finished: they cannot come to count any more."""
        for other in self.place.names(SEGMENTS, f"{segment.name}."):
            if other != segment.data:
                self.place.delete(f"{SEGMENTS}/{other}")
