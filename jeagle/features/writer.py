"""Writing a store: a segment's arrays under a name that nobody else has, then one manifest that makes them count.

And removing what is damaged, or belongs to no segment.
"""

import dataclasses
import itertools
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle.errors import UserError
from jeagle.features.formats import RaggedRows
from jeagle.features.manifests import (
    CLAIMS,
    FORMAT,
    INDEX,
    MANIFESTS,
    SEGMENTS,
    STORE,
    TABLES,
    Segment,
    check_fit,
    check_storage,
    finished_names,
    is_finished,
    read_segment,
    read_store,
    sealed,
    write_index,
)
from jeagle.features.storage import Storage, StorageFull, StorageUnreachable, metadata_sha256, write_array

STALE_SECONDS = 600.0  # a writer on another host that has been silent for so long counts as dead
RENEW_SECONDS = 60.0
POLL_SECONDS = 0.25
_WRITERS_HERE: set[str] = set()  # writers of this process


class WorkUnit(NamedTuple):
    """Consecutive rows of one split that become one segment."""

    name: str
    split: str
    rows: range


def work_units(splits: dict[str, int], rows_each: int) -> list[WorkUnit]:
    """All units of a store, in order: they depend on the data alone, never on who writes.

    Args:
      splits: the number of rows of each split.
      rows_each: the number of rows of a unit.
    """
    return [
        WorkUnit(f"{split}-{start // rows_each:06d}", split, range(start, min(start + rows_each, rows)))
        for split, rows in splits.items()
        for start in range(0, rows, rows_each)
    ]


class Claims:
    """Which segments this writer makes, so that writers that run at the same time share the work.

    The safety of a store does not rest on claims: two writers that make the same segment only waste time, because the
    manifest of the first one to finish stands.

    Attributes:
      writer: a name that no other writer has.
    """

    def __init__(self, storage: Storage):
        self._storage, self.writer = storage, uuid.uuid4().hex[:12]
        _WRITERS_HERE.add(self.writer)
        self._renewed: dict[str, float] = {}

    def take(self, name: str) -> bool:
        """Claims a segment, unless a living writer has done so. The claim of a dead writer is replaced."""
        key = f"{CLAIMS}/{name}.json"
        if self._storage.write_new(key, self._text()):
            self._renewed[name] = time.time()
            return True
        if self.alive(name):
            return False
        self._storage.delete(key)
        return self.take(name) if self._storage.read(key) is None else False

    def alive(self, name: str) -> bool:
        """Whether a living writer, this one included, has claimed the segment."""
        data = self._storage.read(f"{CLAIMS}/{name}.json")
        try:
            claim = json.loads(data or b"null")
            if claim["writer"] in _WRITERS_HERE:
                return True
            if time.time() - claim["renewed"] > STALE_SECONDS:
                return False
            if claim["host"] != socket.gethostname():
                return True
            return claim["process"] != os.getpid() and _process_start(claim["process"]) == claim["started"]
        except (ValueError, KeyError, TypeError):
            return False

    def renew(self) -> None:
        """Writes down that this writer is alive; call it between batches."""
        now = time.time()
        for name, renewed in self._renewed.items():
            if now - renewed > RENEW_SECONDS:
                self._storage.write(f"{CLAIMS}/{name}.json", self._text())
                self._renewed[name] = now

    def drop(self, name: str) -> None:
        """Gives a claim up, when its segment is finished or abandoned."""
        self._renewed.pop(name, None)
        self._storage.delete(f"{CLAIMS}/{name}.json")

    def drop_all(self) -> None:
        """Gives all claims of this writer up."""
        for name in list(self._renewed):
            self.drop(name)

    def _text(self) -> bytes:
        claim = {"writer": self.writer, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps(claim | {"started": _process_start(os.getpid()), "renewed": time.time()}).encode()


def _process_start(process: int) -> str | None:
    """What distinguishes a process from a later one of the same number; None where there is none."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "alive"
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Writer:
    """One of any number of writers of a store.

    Args:
      about: store.json of a new store; an existing one must have the same `made_from`.

    Attributes:
      about: store.json as it is stored: its layout stands, whatever this writer would choose.
      bytes: how many this writer has written.

    Raises:
      UserError: for a store that was made from something else, with the fields named, or that is damaged.
    """

    def __init__(self, storage: Storage, about: dict[str, Any]):
        self.storage, self.claims = storage, Claims(storage)
        check_storage(storage)
        storage.write_new(STORE, sealed({"format": FORMAT} | about))
        self.about = read_store(storage) or about
        advice = "Give another --out, or remove the old store."
        check_fit(storage, about["made_from"], self.about["made_from"], advice)
        check_fit(storage, self.about["made_from"], about["made_from"], advice)
        self.bytes = 0

    def pending(self, units: list[WorkUnit]) -> list[WorkUnit]:
        """Those units that nobody has finished."""
        done = set(finished_names(self.storage))
        return [unit for unit in units if unit.name not in done]

    def take(self, units: list[WorkUnit], count: int = 1) -> list[WorkUnit]:
        """Up to `count` units to make. It waits while living writers have claimed all others; empty: all are done."""
        while left := self.pending(units):
            if taken := list(itertools.islice(filter(self.take_one, left), count)):
                return taken
            time.sleep(POLL_SECONDS)
        return []

    def take_one(self, unit: WorkUnit) -> bool:
        """Claims a unit, unless it is finished or another living writer makes it."""
        if not self.claims.take(unit.name):
            return False
        if is_finished(self.storage, unit.name):
            self.claims.drop(unit.name)
            return False
        return True

    def commit(self, unit: WorkUnit, rows: RaggedRows, chunk: int) -> bool:
        """Writes a unit's rows; False where another writer was first.

        Args:
          chunk: the most entries of an inner chunk of an array.

        Raises:
          UserError: the disk is full; what was written of the unit is removed.
        """
        data = f"{unit.name}.{self.claims.writer}"
        segment = Segment(unit.name, data, unit.split, tuple(unit.rows), tuple(rows.lengths), tuple(rows.teachers))
        return self._commit(segment, rows.arrays, chunk)

    def commit_tables(self, arrays: dict[str, np.ndarray]) -> None:
        """Writes the arrays that belong to no row, unless they are there."""
        if not is_finished(self.storage, TABLES):
            self._commit(Segment(TABLES, f"{TABLES}.{self.claims.writer}"), arrays, 2**16)

    def finish(self) -> None:
        """Writes the index of a store with all its segments, and removes what dead writers left."""
        named = {segment.data for segment in write_index(self.storage)}
        for data in self.storage.names(SEGMENTS):
            if data not in named:
                self.storage.delete(f"{SEGMENTS}/{data}")
        for claim in self.storage.names(CLAIMS):
            self.storage.delete(f"{CLAIMS}/{claim}")

    def _commit(self, segment: Segment, arrays: dict[str, np.ndarray], chunk: int) -> bool:
        storage, folder, size = self.storage, segment.folder, sum(a.nbytes for a in arrays.values())
        try:
            free = storage.free_bytes()
            if free is not None and free < size:  # before others that write to this disk meet a full one
                raise StorageFull
            described = {name: write_array(storage, f"{folder}/{name}", a, chunk) for name, a in arrays.items()}
            segment = dataclasses.replace(segment, arrays=described, bytes=size)
            intact = all(
                metadata_sha256(storage, f"{folder}/{name}") == d["metadata_sha256"] for name, d in described.items()
            )
            manifest = sealed(dataclasses.asdict(segment))
            first = intact and storage.write_new(f"{MANIFESTS}/{segment.name}.json", manifest)
        except StorageFull as error:
            storage.delete(folder)
            done = len(finished_names(storage))
            self.claims.drop_all()
            raise UserError(
                f"The disk of {storage} is full: segment {segment.name} needs {size / 1e6:,.3f} MB and "
                f"{(storage.free_bytes() or 0) / 1e6:,.3f} MB are free. The {done} finished segments are "
                "safe: make room, and start the same command again; it continues from them."
            ) from error
        except BaseException:
            storage.delete(folder)
            if is_finished(storage, segment.name):  # another writer was first, and has removed these arrays
                return False
            raise
        if first:
            self.bytes += size
            for other in storage.names(SEGMENTS, f"{segment.name}."):  # of other writers, which cannot count any more
                if other != segment.data:
                    storage.delete(f"{SEGMENTS}/{other}")
        else:
            storage.delete(folder)
        self.claims.drop(segment.name)
        return first


def prune_store(storage: Storage, damaged: list[str]) -> list[str]:
    """Removes segments, and what belongs to no segment and no living writer; returns the keys that were removed.

    Args:
      damaged: names of the segments to remove, whose rows are then missing.
    """
    removed, claims, named = [], Claims(storage), set[str]()

    def remove(key: str) -> None:
        storage.delete(key)
        removed.append(key)

    # This is read before the manifests: a writer drops its claim only once its manifest is there, so that arrays with
    # neither a claim now nor a manifest later will never count.
    unclaimed = [
        data
        for data, unit in ((data, data.rpartition(".")[0]) for data in storage.names(SEGMENTS))
        if unit in damaged or not claims.alive(unit)
    ]
    # The index goes first: one that outlives a manifest would still name its rows.
    storage.delete(INDEX)
    for name in damaged:
        remove(f"{MANIFESTS}/{name}.json")
    for name in finished_names(storage):
        try:
            segment = read_segment(storage, name)
        except StorageUnreachable:
            raise
        except UserError:
            remove(f"{MANIFESTS}/{name}.json")
            continue
        if segment is not None:
            named.add(segment.data)
    for data in unclaimed:
        if data not in named:
            remove(f"{SEGMENTS}/{data}")
    for key in storage.names(CLAIMS):
        if not claims.alive(key.removesuffix(".json")):
            storage.delete(f"{CLAIMS}/{key}")
    write_index(storage)
    return removed
