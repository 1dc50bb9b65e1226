"""Whether a store's bytes are those that were written, and what may go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jeagle.errors import UserError
from jeagle.features.arrays import checksum, metadata_sha256
from jeagle.features.claims import Claims
from jeagle.features.manifests import CLAIMS, INDEX, MANIFESTS, SEGMENTS, Segment, finished, read_segment, write_index
from jeagle.features.reader import Store
from jeagle.features.remote import Unreachable
from jeagle.features.storage import Place


class Damage(NamedTuple):
    """A segment whose bytes are not those that were written, and what shows it."""

    segment: str
    reason: str


def verify(store: Store, on_done: Callable[[int], None] = lambda done: None) -> Iterator[Damage]:
    """Reads every byte of a store; yields what is wrong with it.

    Args:
      on_done: called with bytes read so far.
    """
    done = 0
    for segment in store.segments:
        reason = _wrong(store, segment)
        done += segment.bytes
        on_done(done)
        if reason:
            yield Damage(segment.name, reason)


def _wrong(store: Store, segment: Segment) -> str | None:
    """What is wrong with a segment; None where nothing is."""
    lengths = {name: described["shape"][0] for name, described in segment.arrays.items()}
    expected = {"tokens": sum(segment.lengths), "taps": sum(segment.aux), "greedy": sum(segment.kept)}
    if any(lengths.get(name, -1) != n for name, n in expected.items() if segment.split):
        return "its arrays are not as long as its rows"
    for name, described in segment.arrays.items():
        if metadata_sha256(store.place, f"{segment.folder}/{name}") != described["metadata_sha256"]:
            return f"{name}/zarr.json is not what was written"
        try:
            array = store.whole(segment, name)
        except Unreachable:  # which says nothing of the bytes
            raise
        except UserError as error:
            return str(error)
        if checksum(array) != described["crc32"]:
            return f"{name} is not what was written"
    return None


def prune(place: Place, damaged: list[str], *, only_damaged: bool = False) -> list[str]:
    """Removes the segments named, and what belongs to no segment and no living writer; returns what went.

    Args:
      damaged: names of segments, whose rows are then missing. only_damaged: leave the rest alone.
    """
    gone, claims, named = [], Claims(place), set[str]()
    # Looked at before the manifests: a writer drops its claim once its manifest is there, so that what has neither now
    # will not come to count.
    left = [
        data
        for data, unit in ((data, data.rpartition(".")[0]) for data in place.names(SEGMENTS))
        if unit in damaged or not (only_damaged or claims.alive(unit))
    ]
    # First of all: an index that outlived a manifest would still name its rows.
    place.delete(INDEX)
    for name in damaged:
        place.delete(f"{MANIFESTS}/{name}.json")
        gone.append(f"{MANIFESTS}/{name}.json")
    for name in finished(place):
        try:
            segment = read_segment(place, name)
        except Unreachable:
            raise
        except UserError:
            place.delete(f"{MANIFESTS}/{name}.json")
            gone.append(f"{MANIFESTS}/{name}.json")
            continue
        if segment is not None:
            named.add(segment.data)
    for data in left:
        if data not in named:
            place.delete(f"{SEGMENTS}/{data}")
            gone.append(f"{SEGMENTS}/{data}")
    for key in place.names(CLAIMS):
        if not claims.alive(key.removesuffix(".json")):
            place.delete(f"{CLAIMS}/{key}")
    place.sweep()
    write_index(place)
    return gone
