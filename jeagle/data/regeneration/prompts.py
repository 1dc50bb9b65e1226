"""Reads prompts, and writes files of answers that survive an interruption."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jeagle.data.sources.catalog import parse_source
from jeagle.data.sources.conversations import Conversation, SourceReport, read_source
from jeagle.data.sources.files import records
from jeagle.data.sources.schema import prompt_ids
from jeagle.data.starter import starter_prompts
from jeagle.errors import UserError
from jeagle.runtime.lock import only_writer
from jeagle.runtime.manifest import atomic_write, differences, fingerprint
from jeagle.runtime.outputs import Output, check_output, json_file, jsonl_file

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Reads the JSON objects of a .jsonl or .jsonl.gz file, unchanged."""
    return [record.row for record in records(path)]


def read_prompts(source: str, *, every_turn: bool = False, most: int = 0) -> list[Row]:
    """Reads prompts, each of them once.

    Rows that cannot be used are left out and printed, as `prepare` does.

    Args:
      source: `starter`, or anything that --data.source accepts; rows of {"turns": ["...", ...]} and rows without
        answers are prompts too.
      every_turn: whether all turns of a conversation are returned, its answers included. If not, it is the turns before
        the first answer, and for {"turns"} the first one. The prompt of a text is the first half of its words.
      most: stops after this number of prompts; 0 = all.

    Returns:
      {"id", "messages", "where"}, and "tools" and "thinking" if the row has them. The id follows from all of these but
      the answers and the place.

    Raises:
      UserError: if the source cannot be read, has no prompts, or if more than 1 % of its rows cannot be used.
    """
    if source == "starter":
        return starter_prompts()[: most or None]
    report = _PromptReport()
    found = read_source(parse_source(source), report, streaming=bool(most), answered=False)
    prompts: dict[str, Row] = {}
    for prompt in (_prompt_of(conversation, every_turn) for conversation in found):
        prompts.setdefault(prompt["id"], prompt)
        if len(prompts) == most:
            break
    report.check()
    if report.rejected:
        print(f"note: {report.rejected.total()} of {report.rows} rows have no usable prompt: {report.reasons()}")
    if not prompts:
        raise UserError(f'{source} contains no prompts: write {{"turns": ["..."]}} on each line.')
    return list(prompts.values())


def make_prompt(messages: list[dict[str, Any]], category: str = "", more: Row | None = None) -> Row:
    """Returns {"id", "messages"} and the further fields; the id follows from all of them but the answers."""
    asked: Any = [message for message in messages if message["role"] != "assistant"]
    number = fingerprint([asked, more] if more else asked)[:12]
    return {"id": number} | ({"category": category} if category else {}) | {"messages": messages} | (more or {})


class _PromptReport(SourceReport):
    """Counts the rows that have no prompt."""

    def check(self) -> None:
        """Raises a UserError that lists the reasons if more rows were rejected than `bad_share` allows."""
        if self.rejected.total() > self.bad_share * max(self.rows, 1):
            raise UserError(
                f"{self.rejected.total()} of {self.rows} rows have no usable prompt: {self.reasons()}. Write "
                f'{{"turns": ["..."]}} or a conversation on each line; {self.bad_share:.0%} of them may be left out.'
            )


def _prompt_of(conversation: Conversation, every_turn: bool) -> Row:
    messages = list(conversation.messages)
    if messages[0]["role"] == "ids":
        ids = prompt_ids(messages[0])
        messages = [{"role": "ids", "ids": ids, "mask": [False] * len(ids)}]
    elif messages[0]["role"] == "text":
        words = messages[0]["content"].split(" ")
        messages = [{"role": "text", "content": " ".join(words[: (len(words) + 1) // 2])}]
    elif not every_turn:
        roles = [message["role"] for message in messages]
        messages = messages[: roles.index("assistant") if "assistant" in roles else roles.index("user") + 1]
    more: Row = {"tools": list(conversation.tools)} if conversation.tools else {}
    more |= {} if conversation.thinking is None else {"thinking": conversation.thinking}
    return make_prompt(messages, more=more) | {"where": conversation.where}


def _foreign(out: Path) -> str:
    """Says why jeagle did not write a file of answers.

    Beside jeagle's answers there is a note, or the unfinished file if the process was stopped before the note.
    """
    if any(Path(f"{out}{ending}").is_file() for ending in (_NOTE, ".partial")):
        return _ANSWERS.foreign(out)
    return f"there is no {out.name}{_NOTE} beside it"


_NOTE = ".made_from.json"
_ANSWERS = jsonl_file("file of answers that jeagle wrote", "id", "finish_reason")
VARIETY = json_file("file of jeagle's on how varied prompts are", "kept", "unusable")
# The kinds of the files that belong to one file of answers, by the ending that is appended to its name.
ANSWER_FILES = {
    "": Output(_ANSWERS.what, False, _foreign),
    ".partial": jsonl_file("file of answers that jeagle has begun", any_of=("made_from", "key")),
    _NOTE: json_file("note of jeagle's on answers", "version"),
}


class AnswerFile:
    """A file of answers, one JSON object with an "id" per line, and a note of the settings that they depend on.

    Until the last answer is there, the rows are appended to OUT.partial. The finished file is sorted, and the note is
    in OUT.made_from.json.

    Args:
      out: a .jsonl or .jsonl.gz file.
      made_from: what the answers depend on, apart from their prompts.

    Raises:
      UserError: if one of these files exists and jeagle did not write it.
    """

    def __init__(self, out: Path, made_from: dict[str, Any]):
        self.out, self.made_from = out, made_from
        self.partial, self._note = Path(f"{out}.partial"), Path(f"{out}{_NOTE}")
        for ending, kind in ANSWER_FILES.items():
            check_output(f"{out}{ending}", kind)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing the same file; UserError that names the process which does."""
        lock = self.out.with_name(f".{self.out.name}.lock")
        return only_writer(lock, str(self.out), "wait until it ends, stop it, or give another --out.")

    def finished(self) -> dict[str, Row]:
        """Returns the rows of a finished file by id, or none if it depends on other settings, which is printed."""
        if not self._note.is_file() or not self.out.is_file():
            return {}
        if fields := differences(json.loads(self._note.read_text()), self.made_from):
            print(f"regenerate: {', '.join(fields)} changed since {self.out} was made; it is made again", flush=True)
            return {}
        return {row["id"]: row for row in read_rows(self.out)}

    def unfinished(self) -> dict[str, Row]:
        """Returns the rows by id that an interrupted run left; a last line that was cut off is removed.

        Raises:
          UserError: if the file was begun with other settings or is damaged.
        """
        if not self.partial.is_file():
            return {}
        lines = self.partial.read_bytes().split(b"\n")[:-1]
        try:
            header, *rows = map(json.loads, lines)
            answers = {row["id"]: row for row in rows}
            # Older versions of jeagle wrote a hash of the settings for answers by a server.
            same = header.get("key") == fingerprint(self.made_from)
            fields = [] if same else differences(header["made_from"], self.made_from)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.partial} was begun with other settings, or is damaged: delete it to start again."
            ) from error
        if fields:
            raise UserError(
                f"{self.partial} was begun with other settings ({', '.join(fields)}): delete it to start again."
            )
        atomic_write(self.partial, b"".join(line + b"\n" for line in lines), ANSWER_FILES[".partial"])
        return answers

    @contextlib.contextmanager
    def growing(self) -> Iterator[Callable[[Row], None]]:
        """Yields a function that appends a row to the unfinished file immediately."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps({"made_from": self.made_from}) + "\n")

            def append(row: Row) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            yield append

    def finish(self, rows: Sequence[Row]) -> None:
        """Writes the finished file and removes the unfinished one."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        atomic_write(self.out, gzip.compress(text, mtime=0) if self.out.suffix == ".gz" else text, ANSWER_FILES[""])
        atomic_write(self._note, json.dumps(self.made_from, indent=1) + "\n", ANSWER_FILES[_NOTE])
        self.partial.unlink(missing_ok=True)
