"""A source -> packed rows on disk, with what is known of them. Only a few conversations are in memory at a time."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from jeagle.data.answers import ConversationError
from jeagle.data.conversations import BAD_SHARE, Conversation, Reading, is_held_out, read_source
from jeagle.data.near import NearDocuments
from jeagle.data.pack import Long, Packer, RowWriter, rows_of
from jeagle.data.render import Rendered, Renderer
from jeagle.data.sources import Part
from jeagle.data.texts import Rules
from jeagle.data.vocabulary import count_tokens
from jeagle.errors import UserError

CHECKED_FIRST, CHECKED_EVERY = 200, 100  # which conversations' ids are compared with apply_chat_template's
LEAST_LEARNT = 0.95  # fewer documents than this share with anything to learn stop the work
_CHUNK = 256  # conversations rendered together
_ROWS = 64  # rows written together
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Shape:
    """How rows are cut out of conversations.

    Attributes:
      row_length: T. long: what becomes of longer conversations. held_out: share set aside to measure on.
      max_conversations: 0 takes all. bad_share: share of rows of the source that may be unusable.
      streaming: hub data sets are read as they come. vocab: V, of the target.
      target: names under which the answers' writer counts as the target itself.
    """

    row_length: int
    vocab: int
    long: Long = "cut"
    held_out: float = 0.0
    max_conversations: int = 0
    bad_share: float = BAD_SHARE
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


def build(
    parts: Sequence[Part],
    tokenizer: Any,
    rules: Rules,
    shape: Shape,
    folder: Path,
    on_done: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes train/, held_out/, held_out.jsonl and set_aside.jsonl into `folder`; returns the statistics.

    Raises:
      UserError: when the source cannot be read, too much of it cannot be used, or nothing in it can be learnt.
    """
    statistics, near = collections.Counter(), NearDocuments()
    with (
        open(folder / "set_aside.jsonl", "w", encoding="utf-8") as log,
        open(folder / "held_out.jsonl", "w", encoding="utf-8") as prompts,
        RowSet(folder / "train", shape) as train,
        RowSet(folder / "held_out", shape) as measured,
    ):
        reading = Reading(log=log, limit=shape.bad_share)
        taken = itertools.islice(
            read_source(parts, reading, streaming=shape.streaming), shape.max_conversations or None
        )
        for conversation, held_out, found in _render_all(taken, Renderer(tokenizer, rules), shape.held_out):
            statistics["conversations"] += 1
            on_done(statistics["conversations"])
            if isinstance(found, ConversationError):
                reading.set_aside(str(found), conversation.where)
                continue
            if held_out:
                prompts.write(_prompt_line(conversation, tokenizer, rules))
            statistics.update(_facts(conversation, found, shape))
            near.add(found[-1].ids, held_out)
            (measured if held_out else train).add(found, conversation)
        reading.check()
        if not statistics["conversations"]:
            labels = ", ".join(part.label for part in parts)
            raise UserError(f"{labels} holds no conversations: give a file with messages in each row.")
        named = {"train": train.finish(), "held_out": measured.finish()}
    _check_learnt(named, shape)
    return _whole(statistics, reading) | near.count() | named


def _facts(conversation: Conversation, documents: Sequence[Rendered], shape: Shape) -> dict[str, int]:
    return {
        "answers_cut_short": int(conversation.truncated),
        "taken_apart": int(len(documents) > 1),
        "on_policy": int(is_of(conversation.model, shape.target)),
        "known_model": int(bool(conversation.model)),
    }


def quantiles(counter: collections.Counter) -> dict[str, Any]:
    """Mean, median, 95th percentile and largest of counted numbers."""
    if not counter:
        return {"mean": 0, "p50": 0, "p95": 0, "max": 0}
    values = np.array(sorted(counter))
    running = np.cumsum([counter[int(v)] for v in values])
    at = {f"p{q}": int(values[np.searchsorted(running, running[-1] * q / 100)]) for q in (50, 95)}
    mean = float((values * np.diff(running, prepend=0)).sum() / running[-1])
    return {"mean": round(mean, 2), **at, "max": int(values[-1])}


def is_of(model: str, target: Sequence[str]) -> bool:
    """Whether `model` is one of the target's names, letters' case and owner left out."""
    return bool(model) and _short(model) in {_short(name) for name in target if name}


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower().partition("==")[0]


def _whole(statistics: collections.Counter, reading: Reading) -> dict[str, Any]:
    columns = [f"{label}: {columns}" for label, columns in reading.columns]
    names = ("conversations", "answers_cut_short", "taken_apart", "on_policy", "known_model")
    return {name: int(statistics[name]) for name in names} | {
        "read": reading.lines,
        "duplicates": reading.duplicates,
        "set_aside": dict(reading.counts),
        "notes": dict(reading.notes),
        "columns": columns,
    }


def _check_learnt(named: dict[str, dict[str, Any]], shape: Shape) -> None:
    lost = sum(side["unsupervised"] + side["dropped"] for side in named.values())
    all_of_them = lost + sum(side["documents"] for side in named.values())
    if lost > (1 - LEAST_LEARNT) * all_of_them:
        p95 = max(side["lengths"]["p95"] for side in named.values())
        raise UserError(
            f"{lost} of {all_of_them} conversations have no answer within --data.row-length {shape.row_length} (95 % "
            f"are at most {p95} tokens long): raise it, or continue long ones with --data.long split."
        )


def _prompt_line(conversation: Conversation, tokenizer: Any, rules: Rules) -> str:
    line: dict[str, Any] = {"id": conversation.id, "messages": conversation.messages}
    if conversation.tools:
        line["tools"] = conversation.tools
    if "thinking" in str(tokenizer.chat_template):
        first = [m for m in conversation.messages if m["role"] == "assistant"][:1]
        line["thinking"] = rules.thinks(first) and rules.reasoning == "keep"
    return json.dumps(line, ensure_ascii=False) + "\n"


def _render_all(
    conversations: Iterable[Conversation], renderer: Renderer, share: float
) -> Iterator[tuple[Conversation, bool, list[Rendered] | ConversationError]]:
    """(conversation, held out, its documents or what is wrong), in order; rendered on a thread while more are read."""
    numbers = {True: itertools.count(), False: itertools.count()}

    def render(chunk: list[tuple[Conversation, bool]]) -> list[tuple]:
        check = []
        for _, held_out in chunk:
            number = next(numbers[held_out])
            check.append(number < CHECKED_FIRST or number % CHECKED_EVERY == 0)
        found = renderer([conversation for conversation, _ in chunk], check)
        return [(*pair, documents) for pair, documents in zip(chunk, found, strict=True)]

    pairs = ((c, is_held_out(c, share)) for c in conversations)
    with ThreadPoolExecutor(1, "render") as worker:
        waiting: collections.deque[Future] = collections.deque()
        for chunk in _chunks(pairs, _CHUNK):
            waiting.append(worker.submit(render, chunk))
            if len(waiting) > 1:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
