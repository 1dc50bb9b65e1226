"""Rows of a batch with their features <-> the ragged arrays of a segment: padding, and `last` where nothing needs it,
cost nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jeagle import align
from jeagle.features.formats import DTYPES, Scaled, Stored
from jeagle.joints import Batch

TOKENS = ("tokens", "segments", "positions", "supervised")  # arrays of a Batch, one entry a token
PER_TOKEN = (*TOKENS, "taps", "taps_row")
PER_KEPT = ("last", "last_row", "greedy", "lse")  # one entry for each position whose `last` is kept


class Ragged(NamedTuple):
    """Rows one after the other.

    Attributes:
      lengths: tokens of each row. kept: positions of each row whose `last` is there.
      arrays: by the names of PER_TOKEN and PER_KEPT; no scales for what is kept as it is.
    """

    lengths: list[int]
    kept: list[int]
    arrays: dict[str, np.ndarray]


def ragged(batch: Batch, stored: Stored, rows: Iterable[int] | None = None) -> Ragged:
    """Cuts the padding off.

    Args:
      batch, stored: host arrays of some rows. rows: which of them; all by default.
    """
    wanted_BT = align.near_supervised(batch, xp=np)
    chosen = range(len(batch.tokens_BT)) if rows is None else list(rows)
    pieces: list[dict[str, np.ndarray]] = []
    for b in chosen:
        length = int((batch.segments_BT[b] > 0).sum())
        if not (batch.segments_BT[b][:length] > 0).all():
            raise ValueError("padding stands before a token")
        kept = np.flatnonzero(wanted_BT[b])
        piece = {name: np.asarray(array[b][:length]) for name, array in zip(TOKENS, batch, strict=True)}
        for name, scaled, places in (("taps", stored.taps, slice(length)), ("last", stored.last, kept)):
            piece[name] = np.asarray(scaled.values[b])[places]
            if scaled.row is not None:
                piece[f"{name}_row"] = np.asarray(scaled.row[b])[places]
        piece["greedy"], piece["lse"] = stored.greedy_BT[b][kept], stored.lse_BT[b][kept]
        pieces.append(piece)
    arrays = {name: np.concatenate([p[name] for p in pieces]) for name in (pieces[0] if pieces else ())}
    lengths, kept_counts = [len(p["tokens"]) for p in pieces], [len(p["greedy"]) for p in pieces]
    return Ragged(lengths, kept_counts, arrays)


def joined(parts: list[Ragged]) -> Ragged:
    """Several Ragged one after the other."""
    arrays = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    return Ragged([n for p in parts for n in p.lengths], [n for p in parts for n in p.kept], arrays)


def empty_batch(rows: int, length: int) -> Batch:
    """Rows of padding."""
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    return Batch(tokens, segments, positions, np.zeros((rows, length), bool))


def empty_stored(rows: int, length: int, like: dict[str, Any]) -> Stored:
    """Zeros for `rows` rows of `length` positions.

    Args:
      like: a segment's description of its arrays, "taps" and "last" among them.
    """
    shape = (rows, length)

    def one(name: str) -> Scaled:
        rest, dtype = like[name]["shape"][1:], like[name]["dtype"]
        values = np.zeros((*shape, *rest), np.dtype(DTYPES.get(_kind(dtype), dtype)))
        if f"{name}_row" not in like:
            return Scaled(values)
        row = np.zeros((*shape, *rest[:-1]), np.float32)
        return Scaled(values, row, np.ones((rows, *rest), np.float32))

    return Stored(one("taps"), one("last"), np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def _kind(dtype: str) -> str:
    return "fp8" if dtype == DTYPES["fp8"].name else dtype
