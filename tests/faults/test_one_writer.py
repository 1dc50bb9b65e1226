"""A run, and a file of answers, has one writer: a second one is told who it is, and a dead one is in nobody's way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jeagle import flags as configs
from jeagle import pipeline, prepare, preview, regenerate, train
from jeagle.errors import UserError
from jeagle.run import dataset
from jeagle.run.claim import claimed
from jeagle.runtime.lock import only_writer
from tests import tiny
from tests.faults.test_users_files import RECIPE, tree

pytestmark = pytest.mark.usefixtures("one_device")
ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from jeagle.runtime.lock import only_writer
with only_writer(Path(sys.argv[1]), "it", "wait", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.readline()
"""
COUNT = """
import sys, time
from pathlib import Path
from jeagle.errors import UserError
from jeagle.runtime.lock import only_writer
counter, left = Path(sys.argv[1]), 40
while left:
    try:
        with only_writer(counter.with_name("lock"), "it", "wait"):
            seen = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(seen + 1))
            left -= 1
    except UserError as error:
        assert "in use by another process" in str(error)
"""


def python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def holder(lock: Path, how: str = "alone") -> Iterator[subprocess.Popen]:
    """Another process that holds a lock until it is told to end."""
    process = python(HOLD, lock, how)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.communicate("\n")


@pytest.fixture
def flags(tmp_path) -> list[str]:
    return tiny.flags(tmp_path, train__steps=1)


def config_of(flags: list[str]) -> configs.RunConfig:
    return configs.from_command_line(["--config", RECIPE, *flags], program="", description="")


def lock_of(flags: list[str]) -> Path:
    return config_of(flags).folder / ".writer.lock"


@pytest.mark.parametrize("command", [train, prepare, pipeline])
def test_a_second_writer_of_a_run_is_told_who_the_first_is(tmp_path, flags, command):
    with holder(lock_of(flags)) as process:
        before = tree(tmp_path)
        with pytest.raises(UserError) as error:
            command.main(["--config", RECIPE, *flags])
        assert tree(tmp_path) == before
    said = str(error.value)
    assert "in use by another process" in said and "\n" not in said
    assert f"process {process.pid} on host {socket.gethostname()}, since 20" in said and str(tmp_path) in said


def test_what_a_killed_writer_left_is_taken_over(tmp_path, flags):
    lock = lock_of(flags)
    with holder(lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL and json.loads(lock.read_text())["pid"] == process.pid
    prepare.main(["--config", RECIPE, *flags])
    assert (tmp_path / "runs" / "tiny" / "data" / "manifest.json").is_file() and not lock.exists()


def test_readers_and_writers_of_a_store_are_free(flags):
    """A store's writers find the run's rows; only rows that are to be made anew need the run for themselves."""
    config = config_of(flags)
    dataset.prepare(config)
    with holder(lock_of(flags)):
        assert dataset.prepare(config).reused
        preview.main([str(config.folder), "--rows", "1"])
        with pytest.raises(UserError, match="in use by another process"):
            dataset.prepare(config_of([*flags, "--data.row-length", "32"]))
    with holder(lock_of(flags), "shared"):  # another writer of a store makes the same rows
        assert not dataset.prepare(config_of([*flags, "--data.row-length", "32"])).reused
        with pytest.raises(UserError, match="in use by another process"):
            prepare.main(["--config", RECIPE, *flags])


@pytest.mark.parametrize("number", [{"JEAGLE_PROCESS_ID": "1"}, {"JEAGLE_DISTRIBUTED": "auto"}])
def test_processes_of_one_run_count_as_one(flags, monkeypatch, number):
    """Only the leader locks, and where joining will tell who leads, nobody does before."""
    with holder(lock_of(flags)):
        with pytest.raises(UserError), claimed(config_of(flags)):
            pass
        for name, value in number.items():
            monkeypatch.setenv(name, value)
        with claimed(config_of(flags)):
            pass


def test_two_regenerates_do_not_write_one_file(tmp_path):
    target, out = tiny.write_target(tmp_path / "target"), tmp_path / "out.jsonl"
    arguments = ["--target", str(target), "--limit", "1", "--max-new-tokens", "1", "--out", str(out)]
    with holder(tmp_path / ".out.jsonl.lock") as process:
        before = tree(tmp_path)
        with pytest.raises(UserError, match=rf"out\.jsonl is in use by another process \(process {process.pid} "):
            regenerate.main(arguments)
        assert tree(tmp_path) == before
    regenerate.main(arguments)
    assert len(out.read_text().splitlines()) == 1 and not (tmp_path / ".out.jsonl.lock").exists()


def test_a_block_within_a_block_of_the_same_process_is_its_own(tmp_path):
    lock = tmp_path / "deep" / "lock"
    with only_writer(lock, "it", "wait"):
        with only_writer(lock, "it", "wait", shared=True):
            pass
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_of_processes_that_contend_only_one_is_inside(tmp_path):
    """Each adds one to a number that it has read a moment before: none is lost though the file comes and goes."""
    (tmp_path / "number").write_text("0")
    processes = [python(COUNT, tmp_path / "number") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "120" and not (tmp_path / "lock").exists()


def test_a_file_of_the_users_is_no_lock(tmp_path):
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(UserError, match="no lock of jeagle's"), only_writer(tmp_path / "lock", "it", "wait"):
        pass
    assert (tmp_path / "lock").read_text() == "mine"


@pytest.mark.parametrize(
    ("host", "alive", "said"),
    [("here", True, "in use by another process"), ("here", False, ""), ("elsewhere", False, "elsewhere, since then")],
)
def test_where_files_cannot_be_locked_their_content_decides(tmp_path, monkeypatch, host, alive, said):
    process = python("input()")
    if not alive:
        process.kill()
        process.wait()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no locks here")))
    told = {"pid": process.pid, "host": socket.gethostname() if host == "here" else host, "since": "then"}
    (tmp_path / "lock").write_text(json.dumps(told))
    try:
        expected = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
        with expected as error, only_writer(tmp_path / "lock", "it", "wait."):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert (tmp_path / "lock").exists() == bool(said)
        assert not said or f"remove {tmp_path / 'lock'}" in str(error.value)
    finally:
        process.kill()
        process.communicate()
