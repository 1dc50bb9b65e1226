"""Signals that ask a run of several processes to stop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

STEPS = """
import sys, time
from jeagle.runtime import distributed
from jeagle.runtime.preemption import stop_requested

distributed.initialise(sys.argv[1], 2, int(sys.argv[2]))
with stop_requested() as stopping:
    for step in range(100_000):
        time.sleep(0.01 + 0.02 * int(sys.argv[2]))  # one is ahead of the other, as dispatch lets it
        if step == 2:
            print("begun", flush=True)
        if stopping(step):
            break
print(step)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(number):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-c", STEPS, address]
    both = [
        subprocess.Popen([*command, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    try:
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
        both[1].send_signal(number)
        said = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] and 2 < int(said[0][0]) < 99_999
