"""Laws of joining a run: nothing to do alone, and a sentence instead of a hang."""

import os
import subprocess
import sys

import jax
import pytest

from jeagle.errors import UserError
from jeagle.runtime import distributed

ADDRESS = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def joined(monkeypatch):
    """The calls that would have joined other processes; the environment is cleared."""
    for name in list(os.environ):
        if name.startswith("JEAGLE_"):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    return calls


def test_a_run_of_one_process_joins_nothing(joined, monkeypatch):
    distributed.initialise()
    distributed.initialise(ADDRESS, 1, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    distributed.initialise()
    assert joined == []
    assert distributed.is_leader()
    distributed.same_everywhere("anything", "a word")


@pytest.mark.parametrize(
    ("processes", "auto", "known"), [("", "", True), ("1", "", True), ("2", "", False), ("", "auto", False)]
)
def test_devices_are_known_alone_and_not_before_others_are_joined(monkeypatch, processes, auto, known):
    if processes:
        for name, value in {"COORDINATOR": ADDRESS, "PROCESSES": processes, "PROCESS_ID": "0"}.items():
            monkeypatch.setenv(f"JEAGLE_{name}", value)
    monkeypatch.setenv("JEAGLE_DISTRIBUTED", auto)
    assert distributed.devices_known() is known


def test_arguments_win_over_the_environment(joined, monkeypatch):
    for name, value in {"COORDINATOR": "far:9", "PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JEAGLE_{name}", value)
    distributed.initialise()
    distributed.initialise(ADDRESS, process_id=0)
    told = [(c["coordinator_address"], c["num_processes"], c["process_id"]) for c in joined]
    assert told == [("far:9", 4, 3), (ADDRESS, 4, 0)]


def test_a_cluster_is_searched_for_only_when_asked(joined, monkeypatch):
    monkeypatch.setenv("JEAGLE_DISTRIBUTED", "auto")
    distributed.initialise()
    assert len(joined) == 1 and "coordinator_address" not in joined[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"JEAGLE_PROCESSES": "2"}, "JEAGLE_COORDINATOR, JEAGLE_PROCESS_ID as well"),
        ({"JEAGLE_COORDINATOR": ADDRESS, "JEAGLE_PROCESSES": "2"}, "needs JEAGLE_PROCESS_ID as well"),
        ({"JEAGLE_COORDINATOR": "host", "JEAGLE_PROCESSES": "2", "JEAGLE_PROCESS_ID": "0"}, "HOST:PORT"),
        ({"JEAGLE_COORDINATOR": ":80", "JEAGLE_PROCESSES": "2", "JEAGLE_PROCESS_ID": "0"}, "HOST:PORT"),
        ({"JEAGLE_COORDINATOR": ADDRESS, "JEAGLE_PROCESSES": "two", "JEAGLE_PROCESS_ID": "0"}, "whole numbers"),
        ({"JEAGLE_COORDINATOR": ADDRESS, "JEAGLE_PROCESSES": "2", "JEAGLE_PROCESS_ID": "2"}, "Process 2 of 2"),
        ({"JEAGLE_DISTRIBUTED": "yes"}, "set it to auto"),
    ],
)
def test_settings_that_cannot_be_are_named(joined, monkeypatch, settings, sentence):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        distributed.initialise()
    assert joined == []


def test_what_jax_says_is_passed_on_in_a_sentence(monkeypatch):
    def refuse(**settings):
        raise RuntimeError("address in use\nand forty lines more")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"Process 1 .* 2 processes .* 127.0.0.1:1 \(address in use\)"):
        distributed.initialise(ADDRESS, 2, 1)


@pytest.mark.parametrize("process_id", [0, 1])
def test_others_that_never_come_are_a_sentence_not_a_crash(process_id):
    """Without the watch jax ends the process with a C++ stack trace."""
    program = f"""
from jeagle.runtime import cli, distributed
cli.run(lambda _: distributed.initialise("127.0.0.1:{_free_port()}", 2, {process_id}, timeout_seconds=1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: Process {process_id} could not join") and done.stderr.count("\n") == 1


def _free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
