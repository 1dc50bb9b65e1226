"""Reads conversations from the rows of a source, and decides which of them are held out for evaluation."""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from jeagle.config import DataConfig
from jeagle.data.sources.catalog import SourcePart
from jeagle.data.sources.columns import MODELS, find_columns, thinking_of, unused
from jeagle.data.sources.json_rows import Record
from jeagle.data.sources.schema import ANSWERING, messages_of, prompt_ids, shown, tools_of, unused_fields
from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint

FIRST_ROWS = 1000  # reading stops after this many rows if none of them can be used


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The messages of one chat.

    Attributes:
      id: 16 hex digits that follow from the messages and the tools.
      messages: in the form that `schema` describes.
      tools: JSON schemas of the tools that the assistant may call.
      model: the model that wrote the answers; empty if that is not known.
      thinking: the thinking switch that the answers were sampled with; None if the row does not say.
      sampled_with: TOKENIZER_HASH/TEMPLATE_HASH under which the `sampled_ids` of the messages are valid; empty if
        there are none.
      where: file and line.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    model: str = ""
    thinking: bool | None = None
    sampled_with: str = ""
    where: str = ""


@dataclasses.dataclass
class SourceReport:
    """Counts what was read from a source and what was rejected, and stops the reading when too much is rejected.

    Attributes:
      rows: rows that were read.
      duplicates: conversations that were dropped because an earlier one is equal.
      rendered, not_rendered: conversations that the chat template could render, and could not.
      rejected: number of rejected rows for each reason.
      examples: the place of the first rejected row for each reason; the log has all of them.
      notes: what was corrected, and how often.
      columns: (label of the part, columns that hold the conversation) and the number of rows.
      unused: (label of the part, column that is not used) and the number of rows that have it.
      log: an open text file for one JSON line per rejected row, or None.
      bad_share: the largest share of rows that may be rejected.
    """

    rows: int = 0
    duplicates: int = 0
    rendered: int = 0
    not_rendered: int = 0
    rejected: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    columns: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    log: Any = None
    bad_share: float = DataConfig.bad_share

    def reject(self, reason: str, where: str) -> None:
        """Counts and logs a rejected row. UserError if none of the first `FIRST_ROWS` rows can be used."""
        # A reason may quote the row, whose control characters must not reach a terminal.
        reason = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in reason)
        self.rejected[reason] += 1
        self.examples.setdefault(reason, where)
        if self.log is not None:
            self.log.write(json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n")
        if self.rows == FIRST_ROWS and self.rejected.total() == self.rows:
            self.check()

    def reject_not_rendered(self, reason: str, where: str) -> None:
        """Rejects a conversation that was read but cannot be rendered.

        Raises:
          UserError: if none of the first `FIRST_ROWS` conversations can be rendered.
        """
        self.not_rendered += 1
        self.reject(reason, where)
        if self.not_rendered == FIRST_ROWS and not self.rendered and self.bad_share < 1:
            raise UserError(
                f"None of the first {FIRST_ROWS} conversations can be rendered: {self.reasons()}. Correct them, or "
                "choose a suitable chat template with --data.template."
            )

    def check(self) -> None:
        """Raises a UserError that lists the reasons if more rows were rejected than `bad_share` allows."""
        bad = self.rejected.total()
        if bad > self.bad_share * max(self.rows, 1):
            raise UserError(
                f"{bad} of {self.rows} conversations cannot be used: {self.reasons()}. Correct or remove them; "
                f"--data.bad-share {self.bad_share:g} is the share that may be rejected."
            )

    def unused_columns(self) -> dict[str, dict[str, int]]:
        """Returns for each part the columns that are not used, and how many rows have them."""
        labels = dict.fromkeys(label for label, _ in self.unused)
        return {label: {name: n for (part, name), n in self.unused.items() if part == label} for label in labels}

    def reasons(self) -> str:
        """Lists the most common reasons, with their numbers and the place of the first row of each."""
        common = self.rejected.most_common(8)
        return "; ".join(f"{reason} ({n} times, first {self.examples[reason]})" for reason, n in common)


def read_source(
    parts: Sequence[SourcePart], report: SourceReport, *, streaming: bool = False, answered: bool = True
) -> Iterator[Conversation]:
    """Yields the conversations of a source one at a time, without duplicates.

    Parts without weights are read one after another. Parts with weights are mixed in this proportion until one of
    them is exhausted, which `report` notes.

    Args:
      answered: whether a conversation must have an answer. If not, rows of {"turns": ["...", ...]} are read too.
    """
    streams = [_read_part(part, report, streaming, answered) for part in parts]
    mixed = _mix(parts, streams, report) if len(parts) > 1 and parts[0].weight is not None else None
    known: set[int] = set()
    for conversation in mixed or (c for stream in streams for c in stream):
        number = int(conversation.id, 16)
        if number in known:
            report.duplicates += 1
            continue
        known.add(number)
        yield conversation


def is_held_out(conversation: Conversation, share: float) -> bool:
    """Whether a conversation is held out for evaluation.

    A hash of the user's turns decides, so that the same prompt is never on both sides of the split.
    """
    turns = [m["content"] for m in conversation.messages if m["role"] == "user"]
    turns = turns or [m["content"] if "content" in m else prompt_ids(m) for m in conversation.messages]
    return int(fingerprint(turns)[:13], 16) / 16**13 < share


def rejection_reason(error: Exception) -> str:
    """Describes in a few words why a row cannot be used."""
    if isinstance(error, RecursionError):
        return "the line is not valid JSON"
    if isinstance(error, UnicodeError):
        return "the text is not valid Unicode"
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)


def _read_part(part: SourcePart, report: SourceReport, streaming: bool, answered: bool) -> Iterator[Conversation]:
    for record in part.rows(streaming=streaming):
        report.rows += 1
        try:
            conversation = _parse_conversation(record, part, report, answered)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            report.reject(rejection_reason(error), record.where)
        else:
            yield conversation


def _parse_conversation(record: Record, part: SourcePart, report: SourceReport, answered: bool) -> Conversation:
    """Parses a row. Answers before the first prompt, as conversations that were cut into pieces have them, go."""
    if record.reason:
        raise ValueError(record.reason)
    row = record.row
    if not answered and isinstance(row, dict) and isinstance(row.get("turns"), list):
        row = row | {"messages": [{"role": "user", "content": text} for text in row["turns"]], "turns": None}
    columns = find_columns(row, part.columns, answered=answered)
    messages, tools = messages_of(row, columns), tools_of(row, columns.ignore)
    roles = [m["role"] for m in messages]
    if answered and not any(m.get("learn", True) for m in messages if m["role"] in ANSWERING):
        raise ValueError("the conversation has no answer")
    if not (answered or {"user", "text", "ids"} & set(roles)):
        raise ValueError("the conversation has no turn of a user")
    report.columns[part.label, columns] += 1
    for name in (*unused(row, columns, messages), *unused_fields(row, columns, messages)):
        report.unused[part.label, name] += 1
    if tools and any("<tools>" in m["content"] for m in messages if m["role"] == "system"):
        report.notes["the system turn lists the tools itself, so that the template is not given them again"] += 1
        tools = []
    plain = [shown(m) for m in messages]  # rows that differ in marks alone are duplicates
    number = fingerprint({"messages": plain, "tools": tools} if tools else plain)
    first = next(i for i, role in enumerate(roles) if role != "system")
    if roles[first] == "assistant":
        stop = roles.index("user") if "user" in roles else len(roles)
        if ("assistant" if answered else "user") not in roles[stop:]:
            raise ValueError("the conversation has an answer without a prompt")
        messages = [*messages[:first], *messages[stop:]]
        report.notes["a conversation begins with an answer, which is removed"] += 1
    model = next((row[name] for name in MODELS if isinstance(row.get(name), str)), "") or part.model
    sampled_with = str(row.get("sampled_with") or "")
    return Conversation(number, tuple(messages), tuple(tools), model, thinking_of(row), sampled_with, record.where)


def _mix(
    parts: Sequence[SourcePart], streams: Sequence[Iterator[Conversation]], report: SourceReport
) -> Iterator[Conversation]:
    weights = [part.weight or 1.0 for part in parts]
    taken = [0] * len(parts)
    while True:
        chosen = min(range(len(parts)), key=lambda i: ((taken[i] + 1) / weights[i], i))
        conversation = next(streams[chosen], None)
        if conversation is None:
            label = parts[chosen].label
            report.notes[f"{label} is exhausted after {taken[chosen]} conversations, so the mixture ends"] += 1
            return
        taken[chosen] += 1
        yield conversation
