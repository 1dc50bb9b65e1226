"""A file of answers that grows as they come, goes on after a stop, and is put in order when the last one is there."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.runtime.manifest import atomic_write, differences

Row = dict[str, Any]


class AnswerFile:
    """Rows of answers, each with an "id", and what they were made from.

    Beside `out` stands OUT.made_from.json once it is finished; until then its rows are in OUT.partial.

    Attributes:
      out: .jsonl or .jsonl.gz. partial: where the rows of an unfinished one are. made_from: what they follow from.
    """

    def __init__(self, out: Path, made_from: dict[str, Any]):
        self.out, self.made_from = out, made_from
        self.partial, self._note = beside(out, ".partial"), beside(out, ".made_from.json")

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
        atomic_write(self.partial, "".join(line + "\n" for line in whole))
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
        atomic_write(self.out, gzip.compress(text, mtime=0) if self.out.suffix == ".gz" else text)
        atomic_write(self._note, json.dumps(self.made_from, indent=1) + "\n")
        self.partial.unlink(missing_ok=True)


def beside(out: Path, ending: str) -> Path:
    """The file of `out`'s name with an ending more."""
    return out.with_name(out.name + ending)
