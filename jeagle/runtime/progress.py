"""One live line for long work, so that nobody has to ask whether it is alive."""

from __future__ import annotations

import collections
import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TextIO

TERMINAL_SECONDS = 0.1
PLAIN_SECONDS = 5.0
BEAT_SECONDS = 30.0
_WINDOW_SAMPLES = 60  # one a second at most: the rate is that of the last minute or more

Figure = float | str | Sequence[float]


class Progress:
    """Shows how much of `total` is done, the latest figures, the rate and the time left.

    On a terminal one line is rewritten; elsewhere (a file, CI) plain lines come, a few seconds apart at least. The end
    is always shown, and so is a sign of life every 30 s while nothing changes, written by a daemon thread. Use it as a
    context manager, or call `close`.

        with Progress(2000, "steps", "train") as progress:
            for step in range(2000):
                ...
                progress.update(step + 1, loss=3.2, accuracy=(0.61, 0.43))

        train: 120/2,000 steps  loss 3.2  accuracy 0.61/0.43  4.1 steps/s  7:39 left

    Args:
      total: of `unit`; 0 where it is not known, as for a compilation.
      unit: plural noun.
      label: the phase.
      stream: where it goes; stderr by default.
      done: what was finished before this process, which the rate leaves out.
      shown: False writes nothing: for all but one process of many.
      clock: seconds, rising.
      beat_seconds: silence after which a sign of life is due.
      quiet_seconds: nothing is shown of work that ends sooner.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str,
        stream: TextIO | None = None,
        *,
        done: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        beat_seconds: float = BEAT_SECONDS,
        quiet_seconds: float = 0.0,
    ):
        self.total, self.unit, self.label = total, unit, label
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._shown, self._clock, self._beat_seconds = shown, clock, beat_seconds
        self._done, self._figures = done, dict[str, Figure]()
        self._started, self._quiet_seconds = clock(), quiet_seconds
        self._written: float | None = None
        self._stale = False
        self._samples = collections.deque([(self._started, done)], maxlen=_WINDOW_SAMPLES)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        if shown:
            threading.Thread(target=self._heartbeat, name=f"progress {label}", daemon=True).start()

    def update(self, done: int, **metrics: Figure) -> None:
        """Notes that `done` of the total are finished. Figures are host values: a device array would be waited for."""
        with self._lock:
            now = self._clock()
            self._done, self._figures, self._stale = done, metrics, True
            if now - self._samples[-1][0] >= 1.0:
                self._samples.append((now, done))
            pause = TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS
            if self._written is None or now - self._written >= pause:
                self._show(now)

    def say(self, text: str) -> None:
        """Writes a line of its own, above the live one."""
        with self._lock:
            self._write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
            if self._terminal and self._written is not None:
                self._show(self._clock())

    def close(self) -> None:
        """Shows the end and stops the sign of life. Calling it again does nothing."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self._terminal:
                self._show(self._clock())
                if self._written is not None:
                    self._write("\n")
            elif self._stale or self._written is None:
                self._show(self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def beat(self) -> None:
        """Shows the line again if nothing has been shown for `beat_seconds`."""
        with self._lock:
            now = self._clock()
            since = self._started if self._written is None else self._written
            if not self._closed.is_set() and now - since >= self._beat_seconds:
                self._show(now)

    def _heartbeat(self) -> None:
        while not self._closed.wait(min(1.0, self._beat_seconds)):
            self.beat()

    def _show(self, now: float) -> None:
        if now - self._started < self._quiet_seconds:
            return
        self._written, self._stale = now, False
        line = self._line(now)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{line[:width]}")
        else:
            self._write(f"{line}\n")

    def _line(self, now: float) -> str:
        count = f"{self._done:,}/{self.total:,}" if self.total else f"{self._done:,}"
        parts = [f"{self.label}: {count} {self.unit}"]
        parts += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in self._figures.items()]
        since, done_then = self._samples[0]
        rate = (self._done - done_then) / (now - since) if now > since else 0.0
        if rate > 0:
            parts.append(f"{_short(rate)} {self.unit}/s")
        if self._closed.is_set() or self._done == self.total or rate <= 0 or not self.total:
            parts.append(f"after {_duration(now - self._started)}")
        else:
            parts.append(f"{_duration((self.total - self._done) / rate)} left")
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        if not self._shown:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a stream that has gone away must not end the work
            self._shown = False


@contextlib.contextmanager
def bytes_progress(label: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """A live line in megabytes for work of over a second; yields what to call with bytes done and bytes in all."""
    with Progress(0, "MB", label, quiet_seconds=1.0, **options) as progress:

        def update(done: int, total: int) -> None:
            progress.total = round(total / 1e6)
            progress.update(round(done / 1e6))

        yield update


def _short(value: Any) -> str:
    """3.2142 -> 3.21, 12345.6 -> 12,346, 1e-05 -> 1e-05, (0.61, 0.4) -> 0.61/0.4, text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "/".join(_short(v) for v in value)
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
