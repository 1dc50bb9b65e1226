"""Stages of a longer work: what is still true of an earlier call is taken, and the rest made."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jeagle.runtime.manifest import atomic_write, differences, file_fingerprint, fingerprint
from jeagle.runtime.outputs import check_replaceable, json_file

Result = dict[str, Any]
NOTE = json_file("note of a stage", "made_from", "seconds", "result")


class Stages:
    """Runs a stage, or takes its result from the note that it left when it was last made from the same things.

    The note also names every file of the stage, with a hash of its bytes (about a second a GB): where one has gone or
    changed, the stage is made again.
    """

    def __init__(self, folder: Path, version: str):
        """`folder` is where the notes lie, in the folder of the work; those of another `version` of the program are no
        longer true."""
        self.folder, self.version, self.seconds = folder, version, {}

    def __call__(
        self,
        name: str,
        made_from: dict[str, Any],
        make: Callable[[], Result],
        files: Callable[[Result], Iterable[Path]] = lambda result: (),
    ) -> Result:
        """The stage's result.

        Args:
          made_from: what the result follows from; compared by its fingerprint.
          make: makes the result, which JSON can hold, and the files.
          files: result -> the files and folders in the folder of the work that the stage wrote.
        """
        check_replaceable(self._path(name), NOTE)
        old = self._note(name, made_from)
        if old and self._look(files(old["result"])) == old["files"]:
            print(f"[{name}] as before", flush=True)
            self.seconds[name] = old["seconds"]
            return old["result"]
        print(f"[{name}]", flush=True)
        started = time.monotonic()
        result = make()
        self.seconds[name] = round(time.monotonic() - started, 1)
        tree = self._made_from(made_from) | {"seconds": self.seconds[name], "result": result}
        tree["files"] = self._look(files(result))
        atomic_write(self._path(name), json.dumps(tree, indent=1) + "\n", NOTE)
        gc.collect()  # a model that the stage held must not stay beside the next one's
        return result

    def made(self, name: str, made_from: dict[str, Any]) -> bool:
        """Whether the stage was made from these things once, whatever has become of its files."""
        return self._note(name, made_from) is not None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.json"

    def _made_from(self, made_from: dict[str, Any]) -> dict[str, Any]:
        return {"made_from": {"version": self.version, "from": fingerprint(made_from)}}

    def _note(self, name: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """The note of a stage that was made from these things; None without one, or where it is damaged."""
        try:
            note = json.loads(self._path(name).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        wanted = self._made_from(made_from) | {"seconds": 0.0, "result": {}, "files": {}}
        if not isinstance(note, dict) or any(type(note.get(n)) is not type(value) for n, value in wanted.items()):
            return None
        return None if differences(note["made_from"], wanted["made_from"]) else note

    def _look(self, paths: Iterable[Path]) -> dict[str, str]:
        """Hashes of all files at or below `paths`, by their path in the folder of the work; empty for a missing one."""
        found: dict[str, str] = {}
        for path in paths:
            below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            found |= {os.path.relpath(p, self.folder.parent): file_fingerprint(p) if p.is_file() else "" for p in below}
        return found
