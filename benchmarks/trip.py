"""The trip of a batch from the configuration to the update, as a tracer sees it.

    python -m benchmarks.trip [--whole]

Trains the tiny target of tests/tiny.py for two steps on one CPU device under `sys.setprofile`. It prints, by stage and
in order of first entry, the files of jeagle/ that are entered and the functions that are entered there. Features,
predictions, loss and update are seen while jit traces the step. Only what happens between the entry and the return of a
stage's functions (`STAGES`) is listed. The run's folder, its progress and its checkpoints are therefore not listed, nor
is `open_inputs`, which checks the settings and opens the rows; they were prepared before, as by `jeagle.prepare`.

The trip consists of the spine (train.py and training/) and of every function that the spine calls itself: a reader
opens these to follow a batch. With --whole, all functions below them are listed too, and so are the backward rules,
which jax calls.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any, NamedTuple

import jeagle

PACKAGE = str(Path(jeagle.__file__).parent) + os.sep
SPINE = ("train.py", "training/")
STAGES = {
    ("train.py", "main"): "configuration",
    ("train.py", "train"): "training",
    ("flags.py", "from_command_line"): "configuration",
    ("training/setup.py", "set_up"): "set-up",
    ("training/setup.py", "Run.batches"): "batch",
    ("training/teacher.py", "read"): "batch",
    ("training/step.py", "train_step"): "step",
    ("training/step.py", "teacher_features"): "features",
    ("drafts/ttt.py", "unroll"): "predictions",
    ("objective/objective.py", "objective"): "loss",
    ("training/step.py", "update"): "update",
}
"""The functions between whose entry and return a stage lasts; the innermost one of a call stack decides."""
ONLY_ITSELF = "train.py"
"""A file whose functions begin a stage for themselves alone, because they also keep the run's books."""


class Entry(NamedTuple):
    """A function of jeagle/ that was entered.

    Attributes:
      stage: a value of `STAGES`.
      file: relative to jeagle/.
      near: whether it belongs to the spine, or the spine called it.
    """

    stage: str
    file: str
    function: str
    near: bool


def name_of(code: CodeType) -> tuple[str, str] | None:
    """(file, function) of a named function of the package; None for other code."""
    if not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
        return None
    return code.co_filename[len(PACKAGE) :].replace(os.sep, "/"), code.co_qualname.split("<locals>.")[-1]


def callers(frame: FrameType | None) -> Iterator[tuple[str, str] | None]:
    """The package's functions on a call stack, the innermost first; None where jax's backward pass lies between two."""
    while frame is not None:
        if name := name_of(frame.f_code):
            yield name
        elif "backward_pass" in frame.f_code.co_name:
            yield None
        frame = frame.f_back


def entry_of(frame: FrameType) -> Entry | None:
    """The entry that a call makes; None outside of the package and of all stages."""
    here = name_of(frame.f_code)
    if here is None:
        return None
    stack = list(callers(frame))
    begun = next((place for place in stack if place in STAGES), None)
    if begun is None or (begun[0] == ONLY_ITSELF and begun != here):
        return None
    return Entry(STAGES[begun], *here, any(place is not None and place[0].startswith(SPINE) for place in stack[:2]))


@contextmanager
def tracing() -> Iterator[dict[Entry, None]]:
    """The entries of this thread, and of threads that the block starts: in order, and each once."""
    entries: dict[Entry, None] = {}

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (entry := entry_of(frame)):
            entries.setdefault(entry)

    gc.disable()  # what it closes would appear at arbitrary places
    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        yield entries
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        gc.enable()


def trip() -> list[Entry]:
    """Trains two steps of a tiny run, and returns what was entered."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    from jeagle import prepare, train
    from tests.tiny import flags

    with TemporaryDirectory() as folder:
        arguments = flags(Path(folder), train__steps=2)
        prepare.main(arguments)
        with tracing() as entries:
            train.main(arguments)
    return list(entries)


def table(entries: list[Entry]) -> list[str]:
    """The lines of the table of stages, files and functions, and a summary."""
    functions: dict[tuple[str, str], dict[str, None]] = {}
    for entry in entries:
        functions.setdefault((entry.stage, entry.file), {}).setdefault(entry.function)
    lines, shown = [], ""
    for (stage, file), names in functions.items():
        first = f"{stage if stage != shown else '':14}{file:36}"
        lines += textwrap.wrap(", ".join(names), 112, initial_indent=first, subsequent_indent=" " * len(first))
        shown = stage
    files = [file for _, file in functions]
    again = sorted({file for file in files if files.count(file) > 1 and not file.startswith(SPINE)})
    spine = len({file for file in files if file.startswith(SPINE)})
    lines += [
        "",
        f"{len(set(files))} files, of which {spine} are the spine; in several stages: {', '.join(again) or 'none'}",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="also list the functions below those that the spine calls")
    whole = parser.parse_args().whole
    with redirect_stdout(sys.stderr):
        entries = trip()
    print("\n".join(table([entry for entry in entries if entry.near or whole])))


if __name__ == "__main__":
    main()
