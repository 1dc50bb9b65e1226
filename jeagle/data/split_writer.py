"""How conversations become rows, and one side of the split as it grows on disk, with its statistics."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from jeagle.data.conversations import BAD_SHARE, Conversation
from jeagle.data.pack import Long, Packer, RowWriter, rows_of
from jeagle.data.render import Rendered
from jeagle.data.vocabulary import count_tokens

_ROWS = 64  # rows written together


@dataclasses.dataclass(frozen=True)
class Shape:
    """How rows are cut out of conversations.

    Attributes:
      row_length: T. long: what becomes of longer conversations. held_out: share set aside to measure on.
      max_conversations: 0 takes all. bad_share: share of rows of the source that may be unusable.
      near_duplicates: what becomes of conversations nearly the same as an earlier one.
      streaming: hub data sets are read as they come. vocab: V, of the target.
      target: names under which the answers' writer counts as the target itself.
    """

    row_length: int
    vocab: int
    long: Long = "cut"
    held_out: float = 0.0
    max_conversations: int = 0
    bad_share: float = BAD_SHARE
    near_duplicates: Literal["keep", "drop"] = "keep"
    streaming: bool = False
    target: tuple[str, ...] = ()


class RowSet:
    """The rows of one side of the split, growing on disk, and their statistics."""

    def __init__(self, folder: Path, shape: Shape):
        self.folder, self._shape = folder, shape
        self._packer, self._writer = Packer(shape.row_length, shape.long), RowWriter(folder, shape.row_length)
        self._closed: list[list[Rendered]] = []
        self._counts = np.zeros(shape.vocab, np.int64)
        self.lengths, self.answers = collections.Counter(), collections.Counter()
        self.tokens = self.packed = 0

    def add(self, documents: Sequence[Rendered], conversation: Conversation) -> None:
        """Packs one conversation's documents."""
        self.answers[sum(m["role"] in ("assistant", "text") for m in conversation.messages)] += 1
        for document in documents:
            self.lengths[len(document.ids)] += 1
            self._closed += self._packer.add(document)
        if len(self._closed) >= _ROWS:
            self._write()

    def finish(self) -> dict[str, Any]:
        """Closes the files; returns the statistics."""
        self._closed += self._packer.finish()
        self._write()
        self._writer.close()
        np.save(self.folder / "counts.npy", self._counts)
        size = self._writer.rows * self._shape.row_length
        packer = self._packer
        return {
            "rows": self._writer.rows,
            "documents": self.packed,
            "tokens": self.tokens,
            "supervised_tokens": int(self._counts.sum()),
            "fill": round(self.tokens / max(size, 1), 4),
            "truncated": packer.truncated,
            "split": packer.split,
            "dropped": packer.dropped,
            "unsupervised": packer.unsupervised,
            "lengths": quantiles(self.lengths),
            "answers": quantiles(self.answers),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._writer.close()

    def _write(self) -> None:
        for start in range(0, len(self._closed), _ROWS):
            rows = rows_of(self._closed[start : start + _ROWS], self._shape.row_length)
            self._counts += count_tokens(rows, self._shape.vocab)
            self.tokens += int((rows.segments_BT > 0).sum())
            self.packed += int(rows.segments_BT.max(axis=1, initial=0).sum())
            self._writer.write(rows)
        self._closed = []


def quantiles(counter: collections.Counter) -> dict[str, Any]:
    """Mean, median, 95th percentile and largest of counted numbers."""
    if not counter:
        return {"mean": 0, "p50": 0, "p95": 0, "max": 0}
    values = np.array(sorted(counter))
    running = np.cumsum([counter[int(v)] for v in values])
    at = {f"p{q}": int(values[np.searchsorted(running, running[-1] * q / 100)]) for q in (50, 95)}
    mean = float((values * np.diff(running, prepend=0)).sum() / running[-1])
    return {"mean": round(mean, 2), **at, "max": int(values[-1])}
