"""Rows of a batch with their features <-> the ragged arrays of a segment: padding, and states where nothing needs them,
cost nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jeagle import align
from jeagle.features.formats import DTYPES, TOP, Scaled, Stored, by_name
from jeagle.interfaces import Batch, TopK

TOKENS = ("tokens", "segments", "positions", "supervised")  # arrays of a Batch, one entry a token
PER_SEEN = ("taps", "taps_row")  # one entry for each position whose taps are kept
PER_KEPT = ("last", "last_row", *TOP, "greedy", "lse")  # one entry for each position whose teacher is kept


class Ragged(NamedTuple):
    """Rows one after the other.

    Attributes:
      lengths: tokens of each row. kept, seen: positions of each row whose teacher, and whose taps, are there.
      arrays: by the names of TOKENS, PER_SEEN and PER_KEPT; no scales for what is kept as it is.
    """

    lengths: list[int]
    kept: list[int]
    seen: list[int]
    arrays: dict[str, np.ndarray]


class Places(NamedTuple):
    """Which positions of rows a store keeps something of, [B, T] each: their tokens, taps and teachers."""

    real_BT: np.ndarray
    seen_BT: np.ndarray
    kept_BT: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """Where an array of that name has an entry."""
        return self.seen_BT if name in PER_SEEN else self.kept_BT if name in PER_KEPT else self.real_BT


def places_of(batch: Batch, aux_at: str) -> Places:
    """What is kept of rows; `taps_at` as in `formats.Form`."""
    real_BT = batch.segments_BT > 0
    seen_BT = align.seen_positions(batch, xp=np) if aux_at == "seen" else real_BT
    return Places(real_BT, seen_BT, align.near_supervised(batch, xp=np))


def ragged(batch: Batch, stored: Stored, rows: Iterable[int] | None = None, *, aux_at: str = "all") -> Ragged:
    """Cuts off what is not kept.

    Args:
      batch, stored: host arrays of some rows. rows: which of them; all by default. taps_at: as in `formats.Form`.
    """
    places = places_of(batch, aux_at)
    chosen = range(len(batch.tokens_BT)) if rows is None else list(rows)
    whole = dict(zip(TOKENS, batch, strict=True)) | by_name(stored)
    if not all(_first(places.real_BT[b]) for b in chosen):
        raise ValueError("padding stands before a token")
    arrays = {
        name: np.concatenate([_cut(np.asarray(array[b]), places.of(name)[b]) for b in chosen])
        for name, array in (whole.items() if len(chosen) else ())
    }
    lengths, seen, kept = ([int(where[b].sum()) for b in chosen] for where in places)
    return Ragged(lengths, kept, seen, arrays)


def _first(where_T: np.ndarray) -> bool:
    """Whether these are the first positions of a row, and no others."""
    return bool(where_T[: int(where_T.sum())].all())


def _cut(array_TX: np.ndarray, where_T: np.ndarray) -> np.ndarray:
    return array_TX[: int(where_T.sum())] if _first(where_T) else array_TX[where_T]


def joined(parts: list[Ragged]) -> Ragged:
    """Several Ragged one after the other."""
    arrays = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    lengths, kept, seen = (list(itertools.chain(*counts)) for counts in zip(*(p[:3] for p in parts), strict=True))
    return Ragged(lengths, kept, seen, arrays)


def empty_batch(rows: int, length: int) -> Batch:
    """Rows of padding."""
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    return Batch(tokens, segments, positions, np.zeros((rows, length), bool))


def empty_stored(rows: int, length: int, like: dict[str, Any]) -> Stored:
    """Zeros for `rows` rows of `length` positions.

    Args:
      like: a segment's description of its arrays, "taps" and "last" or those of TOP among them.
    """
    shape = (rows, length)

    def empty(name: str) -> np.ndarray:
        dtype = like[name]["dtype"]
        return np.zeros((*shape, *like[name]["shape"][1:]), np.dtype(DTYPES.get(_kind(dtype), dtype)))

    def scaled(name: str) -> Scaled:
        if f"{name}_row" not in like:
            return Scaled(empty(name))
        return Scaled(empty(name), empty(f"{name}_row"), np.ones((rows, *like[name]["shape"][1:]), np.float32))

    teacher = scaled("last") if "last" in like else TopK(*map(empty, TOP))
    return Stored(scaled("taps"), teacher, np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def _kind(dtype: str) -> str:
    return "fp8" if dtype == DTYPES["fp8"].name else dtype
