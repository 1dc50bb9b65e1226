"""Conversations and prompts from the rows of a source; setting some aside to measure on."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jeagle.data.files import Record
from jeagle.data.schema import Columns, find_columns, messages_of, model_of, tools_of
from jeagle.data.sources import Part, parse_source
from jeagle.errors import UserError

BAD_SHARE = 0.01  # more than this share of unusable rows stops the reading
_PLACES = 5  # places kept of each reason; all of them are in set_aside.jsonl
FIRST = 1000  # rows after which a source of which nothing can be used is given up


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages of one chat.

    Attributes:
      id: 16 hex digits of the sha256 of messages and tools.
      messages: as `schema` describes them.
      truncated: the last answer was cut off by a length limit.
      tools: JSON schemas of the functions on offer.
      model: which model wrote the answers; empty where that is not known.
      where: file and line.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    truncated: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    model: str = ""
    where: str = ""


@dataclasses.dataclass
class Reading:
    """What was read, and what was set aside.

    Attributes:
      conversations: filled by `read_conversations` alone.
      lines: rows read. duplicates: dropped. rendered, refused: by the chat template, of conversations that were read.
      aside: {reason: the first places}; counts: {reason: how many}; log: where each is written to, if anywhere.
      notes: {what was mended: how often}.
      columns: {columns found: rows}.
    """

    conversations: list[Conversation] = dataclasses.field(default_factory=list)
    lines: int = 0
    duplicates: int = 0
    rendered: int = 0
    refused: int = 0
    aside: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    columns: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    log: Any = None
    limit: float = BAD_SHARE

    def set_aside(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        places = self.aside.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(where)
        if self.log is not None:
            self.log.write(json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n")
        if self.lines == FIRST and self.counts.total() == self.lines:
            self.check()

    def refuse(self, reason: str, where: str) -> None:
        """Sets aside what was read and cannot be rendered. UserError once the first `FIRST` of them all cannot."""
        self.refused += 1
        self.set_aside(reason, where)
        if self.refused == FIRST and not self.rendered and self.limit < 1:
            raise UserError(
                f"None of the first {FIRST} conversations can be rendered: {self._reasons()}. Mend them, or give "
                "a chat template that suits them with --data.template."
            )

    def check(self) -> None:
        """UserError if too much was set aside, with the reasons."""
        bad = self.counts.total()
        if bad > self.limit * max(self.lines, 1):
            raise UserError(
                f"{bad} of {self.lines} conversations cannot be used: {self._reasons()}. Mend or remove them; "
                f"--data.bad-share {self.limit:g} is what may be set aside."
            )

    def _reasons(self) -> str:
        common = self.counts.most_common(8)
        return "; ".join(f"{reason} ({n} times, first {self.aside[reason][0]})" for reason, n in common)


def read_source(parts: Sequence[Part], reading: Reading, *, streaming: bool = False) -> Iterator[Conversation]:
    """The conversations of a source, one at a time and each once.

    Parts without weights follow one another. With weights they are mixed in that proportion until one of them runs
    out, which is noted.
    """
    streams = [_read_part(part, reading, streaming) for part in parts]
    mixed = _mix(parts, streams, reading) if len(parts) > 1 and parts[0].weight is not None else None
    seen: set[int] = set()
    for conversation in mixed or (c for stream in streams for c in stream):
        number = int(conversation.id, 16)
        if number in seen:
            reading.duplicates += 1
            continue
        seen.add(number)
        yield conversation


def read_conversations(source: str) -> Reading:
    """All conversations of a source (see `sources`) in memory, duplicates left out.

    Raises:
      UserError: when there is no such source or over 1 % of its rows cannot be used.
    """
    reading = Reading()
    reading.conversations.extend(read_source(parse_source(source), reading))
    reading.check()
    if not reading.conversations:
        raise UserError(f"{source} holds no conversations: give a jsonl file with messages on each line.")
    return reading


def is_held_out(conversation: Conversation, share: float) -> bool:
    """Decided by a hash of the user's turns: one prompt never stands on both sides."""
    turns = [m["content"] for m in conversation.messages if m["role"] == "user"]
    turns = turns or [m["content"] for m in conversation.messages]
    return int(hashlib.sha256(canonical(turns)).hexdigest()[:13], 16) / 16**13 < share


def split_held_out(
    conversations: Iterable[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """-> (training, held out), by `is_held_out`."""
    training, held_out = [], []
    for conversation in conversations:
        (held_out if is_held_out(conversation, share) else training).append(conversation)
    return training, held_out


def parse_conversation(record: Record, columns: Columns | None = None, model: str = "") -> Conversation:
    """One row's conversation. ValueError, KeyError or TypeError says why there is none."""
    if record.reason:
        raise ValueError(record.reason)
    row = record.row
    columns = fitting_columns(row, columns)
    messages, tools = messages_of(row, columns), tools_of(row)
    if not any(m["role"] in ("assistant", "text") for m in messages):
        raise ValueError("no answer in it")
    what: Any = {"messages": messages, "tools": tools} if tools else messages
    cut = row.get("finish_reason") == "length"
    return Conversation(
        hashlib.sha256(canonical(what)).hexdigest()[:16],
        tuple(messages),
        cut,
        tuple(tools),
        model_of(row) or model,
        record.where,
    )


def _read_part(part: Part, reading: Reading, streaming: bool) -> Iterator[Conversation]:
    for record in part.rows(streaming=streaming):
        reading.lines += 1
        try:
            conversation = parse_conversation(record, part.columns, part.model)
            reading.columns[part.label, fitting_columns(record.row, part.columns)] += 1
            conversation = _mended(conversation, reading)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reading.set_aside(reason(error), record.where)
            continue
        yield conversation


def _mended(conversation: Conversation, reading: Reading) -> Conversation:
    """Without the answers that stand before any prompt, as in conversations that were cut into pieces."""
    messages = conversation.messages
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
    if messages[first]["role"] != "assistant":
        return conversation
    stop = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    kept = (*messages[:first], *messages[stop:])
    if not any(m["role"] == "assistant" for m in kept):
        raise ValueError("an answer without a prompt")
    reading.notes["begins with an answer, which is left out"] += 1
    return dataclasses.replace(conversation, messages=kept)


def _mix(parts: Sequence[Part], streams: Sequence[Iterator[Conversation]], reading: Reading) -> Iterator[Conversation]:
    weights = [part.weight or 1.0 for part in parts]
    taken = [0] * len(parts)
    while True:
        chosen = min(range(len(parts)), key=lambda i: ((taken[i] + 1) / weights[i], i))
        conversation = next(streams[chosen], None)
        if conversation is None:
            reading.notes[
                f"{parts[chosen].label} ran out after {taken[chosen]} conversations, and so the mix ends"
            ] += 1
            return
        taken[chosen] += 1
        yield conversation


def fitting_columns(row: Any, known: Columns | None = None) -> Columns:
    """The columns that hold the row's conversation: the known ones where it has them. ValueError where none do."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object: write one conversation a line")
    if known and all(name in row for name in (known.chat, known.prompt, known.answer, known.text) if name):
        return known
    if (found := find_columns(row)) is None:
        raise ValueError("no messages, conversations, prompt and response, or text in it")
    return found


def canonical(tree: Any) -> bytes:
    """Bytes that do not depend on the order of keys. UnicodeError for text that has no UTF-8."""
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def reason(error: Exception) -> str:
    """Why a row cannot be used, in a few words."""
    if isinstance(error, RecursionError):
        return "no JSON"
    if isinstance(error, UnicodeError):
        return "text that is no Unicode"
    return f"{error} missing" if isinstance(error, KeyError) else str(error)
