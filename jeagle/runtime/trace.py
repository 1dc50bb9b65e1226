"""A profile of some steps, for XProf."""

import sys
from pathlib import Path
from typing import Any, Self

import jax

BEFORE = 3  # steps that are left out first: they compile


class StepTrace:
    """Writes what the devices and the host do in `steps` steps to a folder: `xprof FOLDER` shows it.

    A context manager around each step of a run; 0 steps does nothing.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self._left, self._waiting, self._running = folder, steps, BEFORE, False

    def __enter__(self) -> Self:
        if self._left and not self._running and not self._waiting:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        return self

    def wait(self, result: Any) -> Any:
        """Returns `result`; it waits for it first where the trace is running, which must not end before the step."""
        return jax.block_until_ready(result) if self._running else result

    def __exit__(self, *error: object) -> None:
        self._waiting = max(self._waiting - 1, 0)
        if not self._running:
            return
        self._left -= 1
        if self._left == 0 or error[0] is not None:
            jax.profiler.stop_trace()
            self._running = False
            print(f"profile: {self.folder}", file=sys.stderr, flush=True)
