"""Reads prompts, and writes files of answers that survive an interruption."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jeagle.data.sources.columns import find_columns, thinking_of
from jeagle.data.sources.conversations import rejection_reason
from jeagle.data.sources.files import expand, records
from jeagle.data.sources.json_rows import Record
from jeagle.data.sources.schema import messages_of, prompt_ids, tools_of
from jeagle.data.sources.trees import assemble_trees
from jeagle.data.starter import starter_prompts
from jeagle.errors import UserError
from jeagle.runtime.lock import only_writer
from jeagle.runtime.manifest import atomic_write, differences, fingerprint
from jeagle.runtime.outputs import Output, check_output, json_file, jsonl_file

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Reads the JSON objects of a .jsonl or .jsonl.gz file, unchanged."""
    return [record.row for record in records(path)]


def read_prompts(source: str) -> list[Row]:
    """Reads prompts, each of them once.

    Args:
      source: `starter`, or files of {"turns"}, {"messages"} or other rows of conversations. The prompt of a
        conversation is the turns before its first answer; the prompt of a text is the first half of its words.

    Returns:
      {"id", "category", "messages"}, and "tools" and "thinking" if the row has them.

    Raises:
      UserError: if a line cannot be read or has no prompt; the message names the line.
    """
    if source == "starter":
        return starter_prompts()
    prompts = [_parse_prompt(record) for path in expand(source) for record in assemble_trees(records(path))]
    if not prompts:
        raise UserError(f'{source} contains no prompts: write {{"turns": ["..."]}} on each line.')
    return list({p["id"]: p for p in prompts}.values())


def make_prompt(messages: list[dict[str, Any]], category: str = "") -> Row:
    """Returns {"id", "category", "messages"}; the id follows from the messages."""
    return {"id": fingerprint(messages)[:12], "category": category, "messages": messages}


def _parse_prompt(record: Record) -> Row:
    try:
        if record.reason:
            raise ValueError(record.reason)
        row = record.row
        if isinstance(row, dict) and "turns" in row:
            messages = [{"role": "user", "content": row["turns"][0]}]
        else:
            messages = messages_of(row, find_columns(row, answered=False))
        tools = tools_of(row)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f'{record.where} is not a prompt ({rejection_reason(error)}): write {{"turns": ["..."]}}.'
        ) from error
    if messages[0]["role"] == "ids":
        ids = prompt_ids(messages[0])
        messages = [{"role": "ids", "ids": ids, "mask": [False] * len(ids)}]
    if messages[0]["role"] == "text":
        words = messages[0]["content"].split(" ")
        messages = [{"role": "text", "content": " ".join(words[: (len(words) + 1) // 2])}]
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    if first == 0:
        raise UserError(f"{record.where} begins with an answer: a prompt needs a user turn.")
    more: Row = {"tools": tools} if tools else {}
    thinking = thinking_of(row)
    more |= {} if thinking is None else {"thinking": thinking}
    return make_prompt(messages[:first], str(row.get("category", ""))) | more


def _foreign(out: Path) -> str:
    """Says why jeagle did not write a file of answers.

    Beside jeagle's answers there is a note, or the unfinished file if the process was stopped before the note.
    """
    if any(Path(f"{out}{ending}").is_file() for ending in (_NOTE, ".partial")):
        return _ANSWERS.foreign(out)
    return f"there is no {out.name}{_NOTE} beside it"


_NOTE = ".made_from.json"
_ANSWERS = jsonl_file("file of answers that jeagle wrote", "id", "messages", "finish_reason")
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
