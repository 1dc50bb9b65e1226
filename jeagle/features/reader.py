"""Reading stores: rows by number, many at a time, straight into the arrays of a batch; and every byte, to verify it."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jeagle import align
from jeagle.errors import UserError
from jeagle.features.formats import (
    TEACHER_ARRAYS,
    TOKEN_ARRAYS,
    ScaledVectors,
    StoredFeatures,
    StoreFormat,
    arrays_by_name,
    empty_stored,
)
from jeagle.features.manifests import DATA, SPLITS, TABLES, Segment, read_segments, read_store
from jeagle.features.storage import (
    Storage,
    StorageUnreachable,
    checksum,
    damage,
    metadata_sha256,
    open_array,
    read_into,
)
from jeagle.interfaces import Batch
from jeagle.places import expanded
from jeagle.runtime.cli import shell_word

_OPEN_ARRAYS = 4096  # handles that stay open; each is small

RowNumbers = Iterable[int] | Int[np.ndarray, " B"]


class Store:
    """A store that is read.

    Attributes:
      storage: where it lies.
      about: its store.json.
      row_length: T.
      format: what it contains of features.
      segments: the finished segments when it was opened.

    Raises:
      UserError: where there is no store, or a damaged one.
    """

    def __init__(self, url: str):
        self.storage = Storage(url)
        self.about: dict[str, Any] = read_store(self.storage) or {}
        if not self.about:
            raise UserError(
                f"There is no store at {url}: python -m jeagle.extract --config C --out {shell_word(url)} makes one."
            )
        self.row_length: int = self.about["layout"]["row_length"]
        self.format = StoreFormat.from_json(self.about["made_from"]["arrays"])
        self.segments = read_segments(self.storage)
        self._by_name = {segment.name: segment for segment in self.segments}
        # The segment of each row, and its place among the segment's rows.
        self._locations: dict[str, dict[int, tuple[Segment, int]]] = {split: {} for split in SPLITS}
        for segment in (s for s in self.segments if s.split):
            for place, row in enumerate(segment.rows):
                self._locations[segment.split].setdefault(row, (segment, place))
        self._array = functools.lru_cache(_OPEN_ARRAYS)(self._open)

    def __str__(self) -> str:
        return str(self.storage)

    def rows(self, split: str) -> int:
        """The number of rows of a split, finished or not."""
        return int(self.about["splits"].get(split, {}).get("rows", 0))

    def present(self, split: str) -> list[int]:
        """The numbers of the finished rows, ascending."""
        return sorted(self._locations[split])

    def missing(self) -> int:
        """How many rows are not finished, over both splits."""
        return sum(self.rows(split) - len(self._locations[split]) for split in SPLITS)

    def check_complete(self) -> None:
        """Raises UserError unless every row and the tables are finished."""
        tables = "" if TABLES in self._by_name else ", and its tables"
        if self.missing() or tables:
            raise UserError(
                f"The store {self} is not finished: {self.missing()} of {sum(map(self.rows, SPLITS))} rows are missing"
                f"{tables}. Run the extract command that began it again "
                f"({self.about.get('command', '')}): it makes only what is missing."
            )

    def batch(self, split: str, rows: RowNumbers) -> Batch:
        """The tokens and loss masks of rows, [B, T], in the order given. UserError for a row that is missing."""
        locations = self._locate(split, rows)
        shape = len(locations), self.row_length
        out = Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.int32, np.bool_)))
        self._read(
            (segment, name, sum(segment.lengths[:place]), array[b], range(segment.lengths[place]))
            for b, (segment, place) in enumerate(locations)
            for name, array in zip(TOKEN_ARRAYS, out, strict=True)
        )
        return out

    def stored(self, split: str, rows: RowNumbers, batch: Batch) -> StoredFeatures:
        """The features of rows, in the order given; zeros at positions that the store leaves out.

        Args:
          batch: the same rows, as `batch` gives them.

        Raises:
          UserError: for a row that is missing, bytes that are damaged, or a batch of other rows.
        """
        locations = self._locate(split, rows)
        out = empty_stored(len(locations), self.row_length, locations[0][0].arrays)
        reads: list[tuple[Segment, str, int, np.ndarray, Any]] = []
        lengths_B, near_BT = (batch.segments_BT > 0).sum(axis=1), align.near_supervised(batch, xp=np)
        for b, (segment, place) in enumerate(locations):
            taught = np.flatnonzero(near_BT[b])
            if (lengths_B[b], len(taught)) != (segment.lengths[place], segment.kept[place]):
                raise UserError(f"The store {self} was made for other rows than these: prepare the data from it again.")
            tokens = sum(segment.lengths[:place]), range(lengths_B[b])
            teachers = sum(segment.kept[:place]), taught
            for name, array in arrays_by_name(out).items():
                start, positions = teachers if name in TEACHER_ARRAYS else tokens
                reads.append((segment, name, start, array[b], positions))
        self._read(reads)
        teacher = self._with_channel("last", out.teacher) if isinstance(out.teacher, ScaledVectors) else out.teacher
        return StoredFeatures(self._with_channel("taps", out.aux), teacher, *out[2:])

    def table_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array of the tables; empty where there is none of that name."""
        segment = self._by_name.get(TABLES)
        return tuple(segment.arrays[name]["shape"]) if segment and name in segment.arrays else ()

    def table(self, name: str, index: Any = ...) -> np.ndarray:
        """An array of the tables that exists, such as embed [V, H], or a part of it. UserError for damaged bytes."""
        return self.segment_array(self._by_name[TABLES], name, index)

    def segment_array(self, segment: Segment, name: str, index: Any = ...) -> np.ndarray:
        """An array of a segment, or a part of it. UserError for damaged bytes."""
        try:
            return np.asarray(self._array(segment.name, name)[index].read().result())
        except (ValueError, OSError) as error:
            raise damage(self.storage, segment.name, name, error) from error

    def data_file(self, name: str) -> bytes | None:
        """A file of the prepared data's folder, such as tokenizer.json; None where there is none."""
        return self.storage.read(f"{DATA}/{name}")

    @functools.cached_property
    def channels(self) -> dict[str, np.ndarray]:
        """The scales of channels, "taps" [A, H] and "last" [H], of what is stored in a type of one byte."""
        return {name: self.table(f"{name}_channel") for name in ("taps", "last") if self.table_shape(f"{name}_channel")}

    def _with_channel(self, name: str, scaled: ScaledVectors) -> ScaledVectors:
        if scaled.row is None:
            return scaled
        return scaled._replace(channel=np.repeat(self.channels[name][None], len(scaled.row), axis=0))

    def _locate(self, split: str, rows: RowNumbers) -> list[tuple[Segment, int]]:
        try:
            return [self._locations[split][row] for row in rows]
        except KeyError as error:
            raise UserError(
                f"The store {self} lacks row {error.args[0]} of {split}: run its extract command again."
            ) from None

    def _open(self, segment: str, name: str) -> Any:
        found = self._by_name[segment]
        return open_array(self.storage, f"{found.folder}/{name}", found.arrays[name])

    def _read(self, reads: Iterable[tuple[Segment, str, int, np.ndarray, Any]]) -> None:
        """Reads entries of arrays, all at the same time. UserError for damaged bytes.

        Args:
          reads: (the segment, the array's name, the first entry, out_TX, the position in it of each entry).
        """
        waiting = []
        for segment, name, start, out_TX, positions in (read for read in reads if len(read[4])):
            into = out_TX[positions[0] : positions[-1] + 1]
            if len(into) > len(positions):  # otherwise it is read without a copy
                into = np.empty_like(into[: len(positions)])
            waiting.append(
                (read_into(into, self._array(segment.name, name), start), segment, name, out_TX, positions, into)
            )
        for future, segment, name, out_TX, positions, into in waiting:
            try:
                future.result()
            except (ValueError, OSError) as error:
                raise damage(self.storage, segment.name, name, error) from error
            if not np.may_share_memory(into, out_TX):
                out_TX[positions] = into


class StoreSet:
    """One or several stores that are read as one, their rows one after the other.

    Args:
      source: their places, with commas between them. They are made from the same target, in the same format.
      partial: rows may be missing.
      agree: maps a bool array of which rows are present to those that are present on all processes, because a store
        that grows looks different a moment later; None for a single process.

    Attributes:
      members: the stores.
      partial: as given.

    Raises:
      UserError: where one of them is not a store, or, unless `partial`, where one is not finished.
    """

    def __init__(self, source: str, *, partial: bool = False, agree: Callable[[np.ndarray], np.ndarray] | None = None):
        parts = [source] if os.path.exists(expanded(source)) else source.split(",")
        self.members = [Store(part.strip()) for part in parts if part.strip()]
        if not self.members:
            raise UserError(f"--features {source!r} names no store: give online, auto, STORE, or several as A,B.")
        for store in self.members:
            if not partial:
                store.check_complete()
            elif not store.table_shape("embed") and any(map(store.present, SPLITS)):
                raise UserError(
                    f"The store {store} has lost its {TABLES}: run the extract command that began it again."
                )
        self.partial, self._present = partial, {}
        for split in SPLITS:
            present = np.concatenate([np.isin(np.arange(s.rows(split)), s.present(split)) for s in self.members])
            self._present[split] = agree(present) if agree else present

    def rows(self, split: str) -> int:
        """The number of rows of a split, over all stores."""
        return len(self._present[split])

    def count_present(self, split: str) -> int:
        """How many rows of a split are present on all processes."""
        return int(self._present[split].sum())

    def has_all(self, split: str, rows: Int[np.ndarray, " B"]) -> bool:
        """Whether all of these rows are present: the same on every process that asks for the same rows."""
        return bool(self._present[split][rows].all())

    def batch(self, split: str, rows: RowNumbers) -> Batch:
        """As `Store.batch`."""
        return self._gather(split, rows, lambda store, numbers, _: store.batch(split, numbers))

    def stored(self, split: str, rows: RowNumbers, batch: Batch) -> StoredFeatures:
        """As `Store.stored`."""

        def read(store: Store, numbers: list[int], where: np.ndarray) -> StoredFeatures:
            return store.stored(split, numbers, Batch(*(array[where] for array in batch)))

        return self._gather(split, rows, read)

    def _gather(self, split: str, rows: RowNumbers, read: Callable[[Store, list[int], np.ndarray], Any]) -> Any:
        numbers, ends = np.asarray(list(rows)), np.cumsum([store.rows(split) for store in self.members])
        which = np.searchsorted(ends, numbers, side="right")
        parts, positions = [], []
        for i, store in enumerate(self.members):
            where = np.flatnonzero(which == i)
            if len(where):
                parts.append(read(store, (numbers[where] - ends[i] + store.rows(split)).tolist(), where))
                positions.append(where)
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate(positions))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[order], *parts)


def verify_store(store: Store, on_done: Callable[[int], None] = lambda done: None) -> Iterator[tuple[str, str]]:
    """Reads every byte of a store; yields the name of each damaged segment, and what shows the damage.

    Args:
      on_done: called with the number of bytes read so far.

    Raises:
      StorageUnreachable: object storage gave no answer, which says nothing about the bytes.
    """
    done = 0
    for segment in store.segments:
        if reason := _damage_of(store, segment):
            yield segment.name, reason
        done += segment.bytes
        on_done(done)


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
