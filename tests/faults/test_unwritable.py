"""A place that cannot be written is refused in one sentence before the work begins, and nothing is left there."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jeagle import bench, data
from jeagle.config import to_json
from jeagle.errors import UserError
from jeagle.run import assemble
from jeagle.runtime import manifest
from jeagle.runtime.outputs import check_output, folder_of, json_file, jsonl_file, marked_folder
from tests.faults import test_users_files as users
from tests.faults.test_users_files import inputs, tree

__all__ = ["inputs"]  # the fixture
pytestmark = pytest.mark.usefixtures("one_device")

COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    **{name: lambda ins, out, make=make: make(ins, out.parent)() for name, make in users.WRITE_RUNS.items()},
    **users.WRITE_FILES,
    **users.WRITE_FOLDERS,
}
"""What writes the place RUNS/mine of its second argument, or the place itself."""


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """As a disk or a quota that is full: no file may grow beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOWHERE = Path("/proc/jeagle")  # nobody can make anything in /proc, root included
PLACES: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    "a file system that refuses": lambda tmp: (NOWHERE / "mine", contextlib.nullcontext()),
    "a name that is too long": lambda tmp: (tmp / ("n" * 300) / "mine", contextlib.nullcontext()),
    "a name that leaves no room for a writer's": lambda tmp: (tmp / ("n" * 250) / "mine", no_room()),
    "a full disk": lambda tmp: (tmp / "runs" / "mine", no_room()),
    "a full disk, in a folder that is there": lambda tmp: (tmp / "mine", no_room()),
    "a loop of links": lambda tmp: (loop(tmp) / "mine", contextlib.nullcontext()),
    "a device": lambda tmp: (Path(os.devnull) / "mine", contextlib.nullcontext()),
}


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Whatever takes long fails the test."""

    def begun(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(assemble, "load_target", begun)
    monkeypatch.setattr(data, "prepare_rows", begun)
    monkeypatch.setattr(data, "AnswerServer", begun)
    monkeypatch.setattr(assemble, "load_draft", begun)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused_before_the_work(inputs, tmp_path, command, place, no_work):
    out, limit = PLACES[place](tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError) as error, limit:
        COMMANDS[command](inputs, out)
    assert tree(tmp_path) == before and not NOWHERE.exists()
    assert "\n" not in str(error.value) and "cannot be written" in str(error.value)


WITHIN = ("", "checkpoints", "held_out", "stages", "exports", "profile", "tensorboard", "features", "metrics.jsonl")


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("command", ["train", "pipeline", "prepare"])
def test_every_folder_that_a_run_grows_in_is_tried(inputs, tmp_path, monkeypatch, command, name):
    """A run that is there already: each folder in it may lie on another disk, or belong to somebody else."""
    run = tmp_path / "runs" / "mine"
    shutil.copytree(inputs / "runs" / "mine", run)
    grown = run / name
    if name.endswith(".jsonl"):
        grown.write_text('{"step": 1}\n')
    else:
        grown.mkdir(exist_ok=True)
    real = Path.open

    def open_elsewhere(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode[0] != "r" and (path.parent == grown or path == grown):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_elsewhere)
    said = users.refused(inputs, tmp_path, users.WRITE_RUNS[command](inputs, tmp_path / "runs"))
    assert "Permission denied" in said and str(grown) in said


@pytest.mark.parametrize("name", [name for name in WITHIN if name and "." not in name])
def test_a_file_in_the_place_of_a_folder_of_a_run_is_named(inputs, tmp_path, name):
    run = tmp_path / "runs" / "mine"
    shutil.copytree(inputs / "runs" / "mine", run)
    (run / name).write_text("mine")
    assert name in users.refused(inputs, tmp_path, users.WRITE_RUNS["prepare"](inputs, tmp_path / "runs"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_somebody_else_is_refused(inputs, tmp_path, command, no_work):
    (tmp_path / "runs").mkdir(mode=0o555)
    with pytest.raises(UserError, match="Permission denied"):
        COMMANDS[command](inputs, tmp_path / "runs" / "mine")


KINDS = {
    "file": json_file("file of a test", "a"),
    "file that grows": jsonl_file("file of a test", "a"),
    "folder": marked_folder("folder of a test", "manifest.json", json_file("manifest"), ()),
    "folder that grows": folder_of("folder of a test", {"a.json": json_file("file of a test", "a")}, ["b"]),
}


@pytest.mark.parametrize("name", ['o\'ut "of" sp ace', "[a-z]*?", "#%&;$HOME", "ümläut", "-dash", "..x", "a\\b"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_leaves_no_trace_and_takes_every_name(tmp_path, kind, name):
    for place in (tmp_path / name, tmp_path / name / name, tmp_path / "x" / ".." / name):
        check_output(place, KINDS[kind])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nul\0", "n" * 300])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_no_file_can_have_is_refused(tmp_path, kind, name):
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / name, KINDS[kind])


def test_a_disk_that_fills_during_the_work_ends_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"report cannot be written.*make room"), no_room():
        manifest.atomic_write(tmp_path / "report", "x" * 100, json_file("report"))
    assert not list(tmp_path.iterdir())


def test_bench_shows_what_it_measured_where_the_file_cannot_be_written(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assemble, "load_draft", lambda *args: (1, None, None))
    monkeypatch.setattr(bench.acceptance, "open_bench", lambda *args, **more: None)
    monkeypatch.setattr(bench.acceptance, "prompt_ids", lambda *args: [])

    def measured(*args: Any, **more: Any) -> Any:
        (tmp_path / "out").mkdir()
        return {"acceptance_length": 2.5}, None

    monkeypatch.setattr(bench.acceptance, "measure", measured)
    monkeypatch.setattr(bench.acceptance, "measure_baselines", lambda *args: {})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_json(users.run_config(inputs, tmp_path))))
    with pytest.raises(UserError, match="it is a folder"):
        bench.main(["--run", str(run), "--out", str(tmp_path / "out")])
    assert "2.5" in capsys.readouterr().out
