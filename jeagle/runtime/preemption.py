"""Stopping at the end of the step under way when a signal asks for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[int], bool]]:
    """Yields a function of a step's number that tells whether to stop after it: SIGTERM or SIGINT has come.

    In a run of several processes each of them asks once after every step, and all stop after the same one, a second or
    two after a signal that may have reached any of them: a checkpoint that they save together needs them all.
    A second SIGINT stops this process at once.
    """
    asked = threading.Event()
    together = jax.process_count() > 1

    def ask(number: int, _: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        if together:
            os.kill(os.getpid(), signal.SIGTERM)  # heard by jax.distributed, which tells the other processes

    def stopping(step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if together else asked.is_set()

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    heard = (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
