"""Reading stores: rows by number, many at a time, without a copy in between."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jeagle.errors import UserError
from jeagle.features.arrays import damage, open_array, read_into
from jeagle.features.formats import Form, Scaled, Stored, by_name
from jeagle.features.manifests import DATA, TABLES, Segment, read_segments, read_store
from jeagle.features.rows import PER_SEEN, TOKENS, Places, empty_batch, empty_stored, places_of
from jeagle.features.storage import Place
from jeagle.interfaces import Batch

SPLITS = ("train", "held_out")
_OPEN_ARRAYS = 4096  # handles kept; each is small


class Spot(NamedTuple):
    """Where a row lies: its segment, and the first and the number of its tokens, of its positions whose teacher is
    kept, and of those whose taps are, there."""

    segment: Segment
    start: int
    length: int
    kept_start: int
    kept: int
    seen_start: int
    seen: int


class Store:
    """A store that is read.

    Attributes:
      place, about: where it lies, and its store.json. row_length: T. form: what it keeps.

    Raises:
      UserError: where there is no store, or a damaged one.
    """

    def __init__(self, url: str):
        self.place = Place(url)
        about = read_store(self.place)
        if about is None:
            raise UserError(f"There is no store at {url}: python -m jeagle.extract --config C --out {url} makes one.")
        self.about: dict[str, Any] = about
        self.row_length: int = about["layout"]["row_length"]
        self.form = Form.of(about["made_from"]["arrays"])
        self.segments = read_segments(self.place)
        self._by_name = {segment.name: segment for segment in self.segments}
        self._spots: dict[str, dict[int, Spot]] = {split: {} for split in SPLITS}
        for segment in self.segments:
            self._note(segment)
        self._array = functools.lru_cache(_OPEN_ARRAYS)(self._open)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.place)

    def rows(self, split: str) -> int:
        """Rows of a side, finished or not."""
        return int(self.about["splits"].get(split, {}).get("rows", 0))

    def has(self, split: str, row: int) -> bool:
        return row in self._spots[split]

    def present(self, split: str) -> list[int]:
        """Numbers of the rows that are there, rising."""
        return sorted(self._spots[split])

    def missing(self) -> int:
        """Rows that are not there yet."""
        return sum(self.rows(split) - len(self._spots[split]) for split in SPLITS)

    def check_complete(self) -> None:
        """UserError unless every row, and the tables, are there."""
        lacks_tables = TABLES not in self._by_name
        if self.missing() or lacks_tables:
            of = sum(self.rows(split) for split in SPLITS)
            raise UserError(
                f"The store {self} is not finished: {self.missing()} of {of} rows are missing"
                f"{', and its tables' if lacks_tables else ''}. Run the extract command that began it again "
                f"({self.about.get('command', '')}): it makes only what is missing."
            )

    def spot(self, split: str, row: int) -> Spot:
        """Where a row lies. UserError where it is not there."""
        try:
            return self._spots[split][row]
        except KeyError:
            raise UserError(f"The store {self} lacks row {row} of {split}: run its extract command again.") from None

    def batch(self, split: str, rows: Iterable[int]) -> Batch:
        """The tokens and masks of rows, in the order given."""
        spots = [self.spot(split, row) for row in rows]
        out = empty_batch(len(spots), self.row_length)
        reads = _Reads(self)
        for b, spot in enumerate(spots):
            for name, array in zip(TOKENS, out, strict=True):
                reads.add(spot.segment, name, array[b, : spot.length], spot.start)
        reads.wait()
        return out

    def stored(self, split: str, rows: Iterable[int], batch: Batch) -> Stored:
        """The features of rows, as they are kept; zeros where they are not.

        Args:
          batch: of the same rows, as `batch` gives it.

        Raises:
          UserError: for a row that is not there, or bytes that are damaged.
        """
        spots = [self.spot(split, row) for row in rows]
        out = empty_stored(len(spots), self.row_length, spots[0].segment.arrays)
        held = self.places(batch)
        reads, scatters = _Reads(self), []
        for b, spot in enumerate(spots):
            if tuple(int(where[b].sum()) for where in held) != (spot.length, spot.seen, spot.kept):
                raise UserError(f"The store {self} was made for other rows than these: prepare the data from it anew.")
            for name, array in by_name(out).items():
                where = np.flatnonzero(held.of(name)[b])
                start = spot.seen_start if name in PER_SEEN else spot.kept_start
                if len(where) and where[-1] == len(where) - 1:  # the row's first ones: no copy in between
                    reads.add(spot.segment, name, array[b, : len(where)], start)
                elif len(where):
                    piece = np.empty((len(where), *array.shape[2:]), array.dtype)
                    reads.add(spot.segment, name, piece, start)
                    scatters.append((array[b], where, piece))
        reads.wait()
        for array, places, piece in scatters:
            array[places] = piece
        return self._with_channels(out)

    def places(self, batch: Batch) -> Places:
        """Which positions of rows the store keeps something of."""
        return places_of(batch, self.form.aux_at)

    def table(self, name: str) -> np.ndarray | None:
        """An array of the tables, such as embed [V, W]; None where the store has none of that name."""
        return self.whole(self._by_name[TABLES], name) if self.shape(name) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array of the tables; empty where there is none."""
        segment = self._by_name.get(TABLES)
        return tuple(segment.arrays[name]["shape"]) if segment and name in segment.arrays else ()

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of an array of the tables. UserError for damaged bytes."""
        try:
            return np.asarray(self._array(TABLES, name)[index].read().result())
        except (ValueError, OSError) as error:
            raise damage(self, TABLES, name, error) from error

    def whole(self, segment: Segment, name: str) -> np.ndarray:
        """All of one array of a segment. UserError for damaged bytes."""
        try:
            return np.asarray(self._array(segment.name, name).read().result())
        except (ValueError, OSError) as error:
            raise damage(self, segment.name, name, error) from error

    def data_file(self, name: str) -> bytes | None:
        """A file of the prepared data's folder, such as tokenizer.json."""
        return self.place.read(f"{DATA}/{name}")

    @functools.cached_property
    def channels(self) -> dict[str, np.ndarray]:
        """The channels' scales of narrow arrays, by "taps" and "last"."""
        found = {name: self.table(f"{name}_channel") for name in ("taps", "last")}
        return {name: array for name, array in found.items() if array is not None}

    def _with_channels(self, out: Stored) -> Stored:
        def one(name: str, scaled: Scaled) -> Scaled:
            if scaled.row is None:
                return scaled
            channel = np.broadcast_to(self.channels[name], scaled.channel.shape)
            return scaled._replace(channel=np.ascontiguousarray(channel))

        teacher = one("last", out.teacher) if isinstance(out.teacher, Scaled) else out.teacher
        return out._replace(aux=one("taps", out.aux), teacher=teacher)

    def _note(self, segment: Segment) -> None:
        start = kept_start = seen_start = 0
        for row, length, kept, seen in zip(segment.rows, segment.lengths, segment.kept, segment.aux, strict=True):
            spot = Spot(segment, start, length, kept_start, kept, seen_start, seen)
            self._spots[segment.split].setdefault(row, spot)
            start, kept_start, seen_start = start + length, kept_start + kept, seen_start + seen

    def _open(self, segment: str, name: str) -> Any:
        found = self._by_name[segment]
        return open_array(self.place, f"{found.folder}/{name}", found.arrays[name])

    def array(self, segment: Segment, name: str) -> Any:
        """The tensorstore array; opened once."""
        with self._lock:
            return self._array(segment.name, name)


class _Reads:
    """Reads under way at the same time."""

    def __init__(self, store: Store):
        self._store, self._waiting = store, []

    def add(self, segment: Segment, name: str, out: np.ndarray, start: int) -> None:
        array = self._store.array(segment, name)
        self._waiting.append((read_into(out, array, start, start + len(out)), segment.name, name))

    def wait(self) -> None:
        for future, segment, name in self._waiting:
            try:
                future.result()
            except (ValueError, OSError) as error:
                raise damage(self._store, segment, name, error) from error
