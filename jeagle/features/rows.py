"""Rows of a batch with their features, and the arrays of a segment that hold them one after the other.

A segment contains no padding, and the teacher only of those positions that may teach a slot
(`align.near_supervised`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jeagle import align
from jeagle.features.formats import DTYPES, TOP_K_ARRAYS, ScaledVectors, StoredFeatures, arrays_by_name
from jeagle.interfaces import Batch, TopK

TOKEN_ARRAYS = ("tokens", "segments", "positions", "supervised")  # the arrays of a Batch, one entry a token
TEACHER_ARRAYS = ("last", "last_row", *TOP_K_ARRAYS, "greedy", "lse")  # one entry for each position with a teacher


class RaggedRows(NamedTuple):
    """Rows one after the other, each without its padding.

    Attributes:
      lengths: tokens of each row, and as many aux hidden states.
      teachers: positions of each row whose teacher is stored.
      arrays: by name: those of TOKEN_ARRAYS, "taps" and "taps_row" with an entry a token, those of TEACHER_ARRAYS with
        an entry for each teacher; no scales where hidden states are stored in a float type.
    """

    lengths: list[int]
    teachers: list[int]
    arrays: dict[str, np.ndarray]


def ragged_rows(batch: Batch, stored: StoredFeatures, rows: Iterable[int] | None = None) -> RaggedRows:
    """The chosen rows of a batch and their features, without what a store leaves out.

    Args:
      batch, stored: host arrays of some rows.
      rows: which of these rows; None takes all.

    Raises:
      ValueError: where padding precedes a token.
    """
    lengths_B, near_BT = (batch.segments_BT > 0).sum(axis=1), align.near_supervised(batch, xp=np)
    chosen = range(len(batch.tokens_BT)) if rows is None else list(rows)
    if not all(batch.segments_BT[b, : lengths_B[b]].all() for b in chosen):
        raise ValueError("padding stands before a token")
    arrays = {
        name: np.concatenate(
            [np.asarray(x[b])[near_BT[b] if name in TEACHER_ARRAYS else slice(lengths_B[b])] for b in chosen]
        )
        for name, x in (dict(zip(TOKEN_ARRAYS, batch, strict=True)) | arrays_by_name(stored)).items()
        if len(chosen)
    }
    return RaggedRows([int(lengths_B[b]) for b in chosen], [int(near_BT[b].sum()) for b in chosen], arrays)


def joined_rows(parts: list[RaggedRows]) -> RaggedRows:
    """The rows of several parts one after the other."""
    arrays = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    lengths, teachers = (list(itertools.chain(*counts)) for counts in zip(*(p[:2] for p in parts), strict=True))
    return RaggedRows(lengths, teachers, arrays)


def empty_batch(rows: int, length: int) -> Batch:
    """A batch [rows, length] of padding."""
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    return Batch(tokens, segments, positions, np.zeros((rows, length), bool))


def empty_stored(rows: int, length: int, described: dict[str, Any]) -> StoredFeatures:
    """Zeros for `rows` rows of `length` positions, still without the scales of channels.

    Args:
      described: a segment's description of its arrays, by their names on disk.
    """

    def empty(name: str) -> np.ndarray:
        dtype = described[name]["dtype"]
        return np.zeros((rows, length, *described[name]["shape"][1:]), DTYPES["fp8"] if "float8" in dtype else dtype)

    def scaled(name: str) -> ScaledVectors:
        return ScaledVectors(empty(name), empty(f"{name}_row") if f"{name}_row" in described else None)

    teacher = scaled("last") if "last" in described else TopK(*map(empty, TOP_K_ARRAYS))
    return StoredFeatures(scaled("taps"), teacher, empty("greedy"), empty("lse"))
