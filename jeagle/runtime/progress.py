"""One live line for long work, so that nobody has to ask whether it is alive."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

TERMINAL_SECONDS = 0.1
PLAIN_SECONDS = 5.0
BEAT_SECONDS = 30.0


class Progress(tqdm):
    """Shows how much of `total` is done, the latest metrics, the rate and the time left.

    On a terminal one line is rewritten; elsewhere (a file, CI) plain lines come, a few seconds apart at least. The end
    is always shown, and so is a sign of life every 30 s or so while nothing changes, written by a daemon thread. Use it
    as a context manager, or call `close`.

        with Progress(2000, "steps", "train") as progress:
            for step in range(2000):
                ...
                progress.update(step + 1, loss=3.2, accuracy="0.61 0.43")

        train:   6%|6         | 120/2000 [00:29<07:39,  4.10 steps/s, loss=3.2, accuracy=0.61 0.43]

    Args:
      total: of `unit`; 0 where it is not known, as for a compilation.
      unit: plural noun.
      label: the phase.
      stream: where it goes; stderr by default.
      done: what was finished before this process, which the rate leaves out.
      shown: False writes nothing: for all but one process of many.
      beat_seconds: silence after which a sign of life is due.
      options: further ones of tqdm.
    """

    monitor_interval = 0  # tqdm's own thread is for bars that skip updates by their number

    def __init__(
        self,
        total: int,
        unit: str,
        label: str,
        stream: TextIO | None = None,
        *,
        done: int = 0,
        shown: bool = True,
        beat_seconds: float = BEAT_SECONDS,
        **options: Any,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._last_line, self._silent, self._closed = "", True, threading.Event()
        super().__init__(
            desc=label,
            total=total,
            initial=done,
            unit=unit if options.get("unit_scale") else f" {unit}",
            disable=not shown,
            file=self._stream,
            mininterval=TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS,
            miniters=0,
            smoothing=0.1,
            dynamic_ncols=self._terminal,
            **options,
        )
        if shown:
            threading.Thread(
                target=self._heartbeat, args=(beat_seconds,), name=f"progress {label}", daemon=True
            ).start()

    def update(self, done: int, **metrics: float | str) -> None:
        """Notes that `done` of the total are finished. Metrics are host values: a device array would be waited for."""
        self.set_postfix(metrics, refresh=False)
        super().update(done - self.n)

    def say(self, text: str) -> None:
        """Writes a line of its own, above the live one."""
        if not self.disable:
            with contextlib.suppress(OSError, ValueError):
                write = self.write if self._terminal else print
                write(text, file=self._stream)

    def close(self) -> None:
        """Shows the end and stops the sign of life. Calling it again does nothing."""
        self._closed.set()
        if not self._terminal:
            self.leave = False  # the last line need not be rewritten
            self.refresh()
        with contextlib.suppress(OSError, ValueError):
            super().close()

    def beat(self) -> None:
        """Shows the line again if nothing has been shown since the last beat."""
        if self._silent:
            self.refresh()
        self._silent = True

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Rewrites the line of a terminal; elsewhere writes a new line, unless it says what the last one did."""
        self._silent = False
        if self.format_dict["elapsed"] < self.delay:
            return False
        with contextlib.suppress(OSError, ValueError):  # a stream that has gone away must not end the work
            if self._terminal:
                return super().display(msg, pos)
            if msg is None and str(self) != self._last_line:
                self._last_line = str(self)
                print(self._last_line, file=self._stream, flush=True)
        return False

    def _heartbeat(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            self.beat()


@contextlib.contextmanager
def bytes_progress(label: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """A live line in megabytes for work of over a second; yields what to call with bytes done and bytes in all."""
    with Progress(0, "B", label, delay=1.0, unit_scale=True, **options) as progress:

        def update(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        yield update
