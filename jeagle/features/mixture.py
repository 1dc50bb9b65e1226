"""Several stores read as one, and batches read before they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jeagle.errors import UserError
from jeagle.features.formats import Stored
from jeagle.features.reader import Store
from jeagle.interfaces import Batch

_T = TypeVar("_T")


class Dealt(NamedTuple):
    """What is read for a batch.

    Attributes:
      order: int [B], which row of the batch takes each place. stored: of its rows in that order; of the last ones of
        each shard, where fewer are stored; None where none is read.
    """

    order: np.ndarray
    stored: Stored | None


class Mixture:
    """Several stores read as one: their rows one after the other.

    Attributes:
      stores. weights: how often rows of each come, None for as often as they are there.
    """

    def __init__(self, stores: list[Store], weights: list[float] | None = None):
        self.stores, self.weights = stores, weights

    def rows(self, split: str) -> int:
        return sum(store.rows(split) for store in self.stores)

    def counts(self, split: str) -> list[int]:
        return [store.rows(split) for store in self.stores]

    def batch(self, split: str, rows: Iterable[int]) -> Batch:
        """The tokens and masks of rows, in the order given."""
        return self._gather(split, rows, lambda store, own, _: store.batch(split, own))

    def stored(self, split: str, rows: Iterable[int], batch: Batch) -> Stored:
        """The features of rows, in the order given: those of `Store.stored`."""

        def read(store: Store, own: list[int], places: np.ndarray) -> Stored:
            return store.stored(split, own, Batch(*(array[places] for array in batch)))

        return self._gather(split, rows, read)

    def dealt(self, split: str, own: np.ndarray, rows: Batch, everyone: np.ndarray) -> Dealt:
        """What is read for a batch.

        Args:
          own, rows: this process's row numbers, and rows. everyone: the row numbers of the global batch.
        """
        return Dealt(np.arange(len(own)), self.stored(split, own, rows))

    def _gather(self, split: str, rows: Iterable[int], read: Callable[[Store, list[int], np.ndarray], Any]) -> Any:
        numbers, ends = np.asarray(list(rows)), np.cumsum(self.counts(split))
        which = np.searchsorted(ends, numbers, side="right")
        if len(self.stores) == 1:
            return read(self.stores[0], numbers.tolist(), np.arange(len(numbers)))
        starts = np.concatenate([[0], ends[:-1]])
        parts, places = [], []
        for i, store in enumerate(self.stores):
            own = np.flatnonzero(which == i)
            if len(own):
                parts.append(read(store, (numbers[own] - starts[i]).tolist(), own))
                places.append(own)
        back = np.argsort(np.concatenate(places))
        return _joined(parts, back)


def _joined(parts: list[Any], order: np.ndarray) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return type(first)(*(_joined(list(fields), order) for fields in zip(*parts, strict=True)))
    return None if first is None else np.concatenate(parts)[order]


_WEIGHED = re.compile(r"(?:(?P<weight>[0-9.]+)\*)?(?P<url>.+)")


def open_stores(source: str, *, complete: bool = True) -> Mixture:
    """The stores of `A`, `A,B` or `0.7*A,0.3*B`, all finished where `complete`.

    Raises:
      UserError: for weights that are given for some stores only, or stores that do not go together.
    """
    found = [_WEIGHED.fullmatch(part.strip()) for part in source.split(",") if part.strip()]
    weights = [m["weight"] for m in found if m]
    if not found or None in found or (any(weights) and not all(weights)):
        raise UserError(f"--features {source} is none of online, STORE, A,B and 0.7*A,0.3*B.")
    try:
        numbers = [float(w) for w in weights if w]
    except ValueError:
        raise UserError(f"--features {source}: {', '.join(map(str, weights))} are not all numbers.") from None
    if any(number <= 0 for number in numbers):
        raise UserError(f"--features {source}: weights must be above 0.")
    stores = [Store(m["url"]) for m in found if m]
    for store in stores if complete else ():
        store.check_complete()
    return Mixture(stores, numbers or None)
