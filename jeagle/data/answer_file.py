"""A file of answers that grows as they come, goes on after a stop, and is put in order when the last one is there."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.runtime.lock import only_writer
from jeagle.runtime.manifest import atomic_write, differences
from jeagle.runtime.outputs import Output, check_replaceable, json_file, jsonl_file

Row = dict[str, Any]

_ANSWERS = jsonl_file("file of answers that jeagle wrote", "id", "messages", "finish_reason")
PARTIAL = jsonl_file("file of answers that jeagle has begun", any_of=("made_from", "key"))
VARIETY = json_file("file of jeagle's on how varied prompts are", "kept", "unusable")
_NOTE = ".made_from.json"


def _foreign(out: Path) -> str:
    """Rows of jeagle's have a note beside them, or, where a process was stopped before it, the unfinished file."""
    if any(beside(out, ending).is_file() for ending in (_NOTE, ".partial")):
        return _ANSWERS.foreign(out)
    return f"there is no {out.name}{_NOTE} beside it"


ANSWERS = Output(_ANSWERS.what, False, _foreign)
ANSWER_FILES = {"": ANSWERS, ".partial": PARTIAL, _NOTE: json_file("note of jeagle's on answers", "version")}
"""Kinds of the files that belong to one file of answers, by what is added to its name."""


class AnswerFile:
    """Rows of answers, each with an "id", and what they were made from.

    Beside `out` stands OUT.made_from.json once it is finished; until then its rows are in OUT.partial.

    Attributes:
      out: .jsonl or .jsonl.gz. partial: where the rows of an unfinished one are. made_from: what they follow from.

    Raises:
      UserError: where one of these names is that of a user's file.
    """

    def __init__(self, out: Path, made_from: dict[str, Any]):
        self.out, self.made_from = out, made_from
        self.partial, self._note = beside(out, ".partial"), beside(out, _NOTE)
        for ending, kind in ANSWER_FILES.items():
            check_replaceable(beside(out, ending), kind)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, no other process writes the same file. UserError that names the one which does."""
        lock = self.out.with_name(f".{self.out.name}.lock")
        return only_writer(lock, str(self.out), "wait until it ends, stop it, or give another --out.")

    def finished(self) -> dict[str, Row]:
        """Rows by id of a finished file, if it was made from the same; says so if it was not."""
        if not self._note.is_file() or not self.out.is_file():
            return {}
        if fields := differences(json.loads(self._note.read_text()), self.made_from):
            print(f"regenerate: {', '.join(fields)} changed since {self.out} was made; making it anew", flush=True)
            return {}
        text = gzip.decompress(self.out.read_bytes()) if self.out.suffix == ".gz" else self.out.read_bytes()
        return {row["id"]: row for row in map(json.loads, text.decode().splitlines())}

    def unfinished(self) -> dict[str, Row]:
        """Rows by id that a stopped run left, a last line that was cut off left out.

        UserError if it was made otherwise.
        """
        if not self.partial.is_file():
            return {}
        whole = self.partial.read_text(encoding="utf-8").split("\n")[:-1]
        fields = differences(json.loads(whole[0]).get("made_from", {}), self.made_from) if whole else ["everything"]
        if fields:
            raise UserError(
                f"{self.partial} was begun with other settings ({', '.join(fields)}): delete it to start anew."
            )
        atomic_write(self.partial, "".join(line + "\n" for line in whole), PARTIAL)
        return {row["id"]: row for row in map(json.loads, whole[1:])}

    @contextlib.contextmanager
    def growing(self) -> Iterator[Callable[[Row], None]]:
        """Yields a function that appends a row to the unfinished file, at once."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps({"made_from": self.made_from}) + "\n")

            def append(row: Row) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            yield append

    def finish(self, rows: Sequence[Row]) -> None:
        """Writes the finished file, and removes the unfinished one."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        atomic_write(self.out, gzip.compress(text, mtime=0) if self.out.suffix == ".gz" else text, ANSWERS)
        atomic_write(self._note, json.dumps(self.made_from, indent=1) + "\n", ANSWER_FILES[_NOTE])
        self.partial.unlink(missing_ok=True)


def beside(out: Path, ending: str) -> Path:
    """The file of `out`'s name with an ending more."""
    return out.with_name(out.name + ending)
