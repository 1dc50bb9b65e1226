"""Whether a store's bytes are those that were written, and what can be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jeagle.errors import UserError
from jeagle.features.arrays import checksum, metadata_sha256
from jeagle.features.manifests import (
    CLAIMS,
    INDEX,
    MANIFESTS,
    SEGMENTS,
    Segment,
    finished_names,
    read_segment,
    write_index,
)
from jeagle.features.reader import Store
from jeagle.features.storage import Storage, StorageUnreachable
from jeagle.features.writer import Claims


class DamagedSegment(NamedTuple):
    """A segment whose bytes are not those that were written, and what shows it."""

    segment: str
    reason: str


def verify_store(store: Store, on_done: Callable[[int], None] = lambda done: None) -> Iterator[DamagedSegment]:
    """Reads every byte of a store; yields its damaged segments.

    Args:
      on_done: called with the number of bytes read so far.

    Raises:
      StorageUnreachable: object storage gave no answer, which says nothing about the bytes.
    """
    done = 0
    for segment in store.segments:
        reason = _damage_of(store, segment)
        done += segment.bytes
        on_done(done)
        if reason:
            yield DamagedSegment(segment.name, reason)


def _damage_of(store: Store, segment: Segment) -> str | None:
    """What shows that a segment is damaged; None where nothing does."""
    lengths = {name: described["shape"][0] for name, described in segment.arrays.items()}
    expected = {"tokens": sum(segment.lengths), "taps": sum(segment.lengths), "greedy": sum(segment.kept)}
    if any(lengths.get(name, -1) != n for name, n in expected.items() if segment.split):
        return "its arrays are not as long as its rows"
    for name, described in segment.arrays.items():
        if metadata_sha256(store.storage, f"{segment.folder}/{name}") != described["metadata_sha256"]:
            return f"{name}/zarr.json is not what was written"
        try:
            array = store.segment_array(segment, name)
        except StorageUnreachable:
            raise
        except UserError as error:
            return str(error)
        if checksum(array) != described["crc32"]:
            return f"{name} is not what was written"
    return None


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
