"""Where the metrics of a run go. metrics.jsonl is always written; the rest are entries of one table."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import jsonl_file

METRICS = jsonl_file("file of a run's metrics", "step")


class JsonlTracker:
    """Appends one JSON object a step, `{"step": 10, "loss": 3.2}`, to FOLDER/metrics.jsonl.

    Lines of later steps than `resume_step` are dropped first, and so is a line that a killed process left half
    written: the file then says what an uninterrupted run would have said. Numbers that JSON lacks become null.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        path = folder / "metrics.jsonl"
        text = path.read_text("utf-8", "replace") if path.is_file() else None
        rows = ((_row(line), line) for line in (text or "").split("\n"))
        kept = "".join(f"{line}\n" for row, line in rows if row and row["step"] <= resume_step)
        if kept != text:
            atomic_write(path, kept, METRICS)
        self._file = path.open("a", encoding="utf-8")
        self.close = self._file.close

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()


class TensorBoardTracker:
    """Writes scalars for TensorBoard to FOLDER/tensorboard, in a thread of tensorboardX's own."""

    def __init__(self, folder: Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        purge = {"purge_step": resume_step + 1} if resume_step else {}
        self._writer = SummaryWriter(str(folder / "tensorboard"), **purge)
        self.close = self._writer.close

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)


TRACKERS: dict[str, Callable[[Path, int], Any]] = {"tensorboard": TensorBoardTracker}
"""Made of a run's folder and of the last step that is kept; `log` takes host numbers, and `close` ends it."""


class Trackers(contextlib.ExitStack):
    """Several trackers as one, and a context manager that closes them."""

    def __init__(self, trackers: Iterable[Any] = ()):
        super().__init__()
        self._trackers = [self.enter_context(contextlib.closing(tracker)) for tracker in trackers]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)


def open_trackers(names: Iterable[str], folder: str | Path, resume_step: int = 0) -> Trackers:
    """metrics.jsonl and the named trackers, in a run's folder.

    Args:
      names: of TRACKERS.
      folder: of the run; made if it does not exist.
      resume_step: the last step that is kept: 0 starts anew.

    Raises:
      UserError: a name that TRACKERS lacks.
    """
    folder, names = Path(folder), list(names)
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UserError(f"No tracker is called {', '.join(unknown)}: --trackers takes {', '.join(sorted(TRACKERS))}.")
    return Trackers([JsonlTracker(folder, resume_step), *(TRACKERS[name](folder, resume_step) for name in names)])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a folder, rising, the last line of each; none without a file.

    A line that a killed process left half written, or that is no text, is passed over.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8", "replace").split("\n") if path.is_file() else []
    rows = {row["step"]: row for line in lines if (row := _row(line))}
    return [rows[step] for step in sorted(rows)]


def scores(folder: Path, measure: str) -> dict[int, float]:
    """A measure of metrics.jsonl by step; minus infinity where it was no number, nothing where there is no file."""
    return {row["step"]: row[measure] if is_number(row.get(measure)) else -math.inf for row in read_metrics(folder)}


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _row(line: str) -> dict[str, Any] | None:
    """The metrics of a line; None where it was cut off, or is not of a step."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and is_number(row.get("step")) else None
