"""Stages of a longer work: what is still true of an earlier call is taken, and the rest made."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jeagle.runtime.manifest import atomic_write, differences, fingerprint
from jeagle.runtime.outputs import check_replaceable, json_file

NOTE = json_file("note of a stage", "made_from", "seconds", "result")


class Stages:
    """Runs a stage, or takes its result from the note that it left when it was last made from the same things."""

    def __init__(self, folder: Path, version: str):
        """`folder` is where the notes lie; those of another `version` of the program are no longer true."""
        self.folder, self.version, self.seconds = folder, version, {}

    def __call__(self, name: str, made_from: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        note = self.folder / f"{name.replace(' ', '_')}.json"
        made_from = {"version": self.version, "from": fingerprint(made_from)}
        check_replaceable(note, NOTE)
        old = _read(note)
        if old and not differences(old["made_from"], made_from):
            print(f"[{name}] as before", flush=True)
            self.seconds[name] = old["seconds"]
            return old["result"]
        print(f"[{name}]", flush=True)
        started = time.monotonic()
        result = make()
        self.seconds[name] = round(time.monotonic() - started, 1)
        tree = {"made_from": made_from, "seconds": self.seconds[name], "result": result}
        atomic_write(note, json.dumps(tree, indent=1) + "\n", NOTE)
        gc.collect()  # a model that the stage held must not stay beside the next one's
        return result


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
