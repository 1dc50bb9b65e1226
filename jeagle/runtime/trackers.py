"""Where the metrics of a run go. metrics.jsonl is always written; the rest are entries of one table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, Self

from jeagle.errors import UserError
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import jsonl_file

METRICS = jsonl_file("file of a run's metrics", "step")


class Tracker(Protocol):
    """What takes metrics, which are host numbers."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """Appends one JSON object a step, `{"step": 10, "loss": 3.2}`, to FOLDER/metrics.jsonl.

    Lines of later steps than `resume_step` are dropped first, and so is a line that a killed process left half
    written: the file then says what an uninterrupted run would have said. Numbers that JSON lacks become null.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        path = Path(folder) / "metrics.jsonl"
        text = path.read_text("utf-8") if path.is_file() else None
        kept = "".join(f"{line}\n" for line in (text or "").splitlines() if _step_of(line) <= resume_step)
        if kept != text:
            atomic_write(path, kept, METRICS)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardTracker:
    """Writes scalars for TensorBoard to FOLDER/tensorboard, in a thread of tensorboardX's own."""

    def __init__(self, folder: Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        purge = {"purge_step": resume_step + 1} if resume_step else {}
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), **purge)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
}


class Trackers:
    """Several trackers as one, and a context manager that closes them."""

    def __init__(self, trackers: Iterable[Tracker]):
        self._trackers = list(trackers)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_trackers(names: Iterable[str], folder: str | Path, resume_step: int = 0) -> Trackers:
    """metrics.jsonl and the named trackers, in a run's folder.

    Args:
      names: of TRACKERS.
      folder: of the run; made if it does not exist.
      resume_step: the last step that is kept: 0 starts anew.

    Raises:
      UserError: a name that TRACKERS lacks, or whose package is not installed.
    """
    folder, names = Path(folder), list(names)
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UserError(f"No tracker is called {', '.join(unknown)}: --trackers takes {', '.join(sorted(TRACKERS))}.")
    opened: list[Tracker] = [JsonlTracker(folder, resume_step)]
    for name in names:
        try:
            opened.append(TRACKERS[name](folder, resume_step))
        except ImportError as error:
            raise UserError(f"The tracker {name} needs the package {error.name}: pip install {error.name}.") from error
    return Trackers(opened)


def scores(folder: Path, measure: str) -> dict[int, float]:
    """A measure of metrics.jsonl by step; minus infinity where it was no number, nothing where there is no file."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    whole = (json.loads(line) for line in lines if math.isfinite(_step_of(line)))
    return {row["step"]: _number(row.get(measure), -math.inf) for row in whole}


def _step_of(line: str) -> float:
    """The step of a line; infinity, so that it is dropped, for a line cut off."""
    try:
        return _number(json.loads(line)["step"], math.inf)
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _number(value: Any, otherwise: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise
