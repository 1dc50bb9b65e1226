"""A store that has some of a run's rows: which rows of a batch are read, and which are left to the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jeagle.errors import UserError
from jeagle.features.manifests import TABLES
from jeagle.features.mixture import Dealt, Mixture
from jeagle.features.reader import SPLITS, Store
from jeagle.interfaces import Batch


class Layout(NamedTuple):
    """How a batch's rows lie.

    Attributes:
      processes: that each have the same number of rows, one after the other's.
      shards: groups of devices of one process that each have the same number of its rows, one after the other's.
      parts: that each shard's rows are worked through in by turns, by side of the split; 1 where it is not named.
    """

    processes: int = 1
    shards: int = 1
    parts: Mapping[str, int] = {}


class Partial(Mixture):
    """A store of which rows may be missing.

    Every shard computes the same number of rows, its first ones, and reads the others. That number is one of
    `widths`, so that few programs are compiled; the rows that the store lacks are dealt over the shards, so that it is
    small. A batch's rows therefore change places among themselves, which changes no sum over them.

    Args:
      layout: how batches lie on the devices.
      agree: what all processes hold of a bool array: a store that grows looks different a moment later.

    Raises:
      UserError: for a store that has rows and lacks what belongs to all of them.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout = Layout(),  # noqa: B008, it never changes
        agree: Callable[[np.ndarray], np.ndarray] = lambda there: there,
    ):
        super().__init__([store])
        self._layout = layout
        self._there = {}
        for split in SPLITS:
            there = np.zeros(store.rows(split), bool)
            there[store.present(split)] = True
            self._there[split] = agree(there)
        if not store.shape("embed") and any(there.any() for there in self._there.values()):
            raise UserError(f"The store {store} has lost its {TABLES}: run the extract command that began it again.")

    def count_present(self, split: str) -> int:
        """Rows of a side that are there."""
        return int(self._there[split].sum())

    def dealt(self, split: str, own: np.ndarray, rows: Batch, everyone: np.ndarray) -> Dealt:
        there, layout = self._there[split], self._layout
        per_shard = len(own) // layout.shards
        lacking = (~there[everyone]).reshape(layout.processes, -1).sum(axis=1)
        needed = -(-int(lacking.max()) // layout.shards)
        first = next(w for w in widths(per_shard, layout.parts.get(split, 1)) if w >= needed)
        if first == per_shard:
            return Dealt(np.arange(len(own)), None)
        order = deal(there[own], layout.shards) if first else np.arange(len(own))
        read = order.reshape(layout.shards, per_shard)[:, first:].reshape(-1)
        return Dealt(order, self.stored(split, own[read], Batch(*(array[read] for array in rows))))


def widths(rows: int, parts: int) -> list[int]:
    """How many of a shard's rows may be computed: none, all, and quarters, in multiples of `parts`, which divides
    `rows`."""
    return sorted({-(-rows * quarters // (4 * parts)) * parts for quarters in range(5)})


def deal(there_B: np.ndarray, shards: int) -> np.ndarray:
    """An order of rows in which each shard begins with its share of those that are not there: int64 [B]."""
    missing_first = np.argsort(there_B, kind="stable")
    return missing_first.reshape(-1, shards).T.reshape(-1)
