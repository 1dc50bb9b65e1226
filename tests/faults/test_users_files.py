"""Whatever a command is pointed at, a user's files stay byte for byte, and a refused command leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jeagle import (
    bench,
    export,
    extract,
    import_draft,
    import_features,
    pipeline,
    prepare,
    preview,
    regenerate,
    report,
    train,
)
from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.run import dataset
from jeagle.run.claim import CONFIG
from jeagle.runtime import manifest
from jeagle.runtime.outputs import Output, check_replaceable, json_file, jsonl_file, marked_folder
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")
RECIPE = str(Path(__file__).parents[2] / "configs" / "llama3_8b.py")


def tree(folder: Path) -> dict[str, str]:
    """Every name below a folder, with a digest of each file's bytes and where each link points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny target, chats, and a run that is prepared: everything that the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    dataset.prepare(run_config(folder, folder / "runs"))
    return folder


def run_config(inputs: Path, runs: Path, name: str = "mine") -> configs.RunConfig:
    flags = tiny.flags(inputs, runs=runs, name=name)
    return configs.from_command_line(["--config", RECIPE, *flags], program="", description="")


def refused(inputs: Path, work: Path, call: Callable[[], Any]) -> str:
    """What a command says that must refuse; nothing in either folder has changed after it."""
    before = tree(work), tree(inputs)
    with pytest.raises(UserError) as error:
        call()
    assert (tree(work), tree(inputs)) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def of_run(main: Callable[[list[str]], Any], *more: str) -> Callable[..., Callable[[], Any]]:
    """A command that writes the folder RUNS/mine."""

    def bound(inputs: Path, runs: Path, source: Path | None = None) -> Callable[[], Any]:
        flags = tiny.flags(inputs, runs=runs, name="mine", train__steps=1)
        if source is not None:
            flags += ["--data.source", str(source)]
        given = [part.replace("{inputs}", str(inputs)) for part in more]
        return lambda: main(["--config", RECIPE, *flags, *given])

    return bound


WRITE_RUNS = {
    "prepare": of_run(prepare.main),
    "train": of_run(train.main),
    "pipeline": of_run(pipeline.main),
    "pipeline that answers first": of_run(pipeline.main, "--data.source", "starter", "--regenerate.live", "True"),
    "extract": of_run(extract.main),
    "extract to a store elsewhere": of_run(extract.main, "--out", "{inputs}/nowhere/store"),
    "from_speculators": of_run(import_features.main, "--source", "{inputs}", "--out", "{inputs}/nowhere/store"),
}


def users_target(inputs: Path, run: Path) -> None:
    shutil.copytree(inputs / "target", run)


def users_notes(inputs: Path, run: Path) -> None:
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")


def users_file(inputs: Path, run: Path) -> None:
    run.parent.mkdir(parents=True)
    run.write_text("mine")


def file_above(inputs: Path, run: Path) -> None:
    run.parent.write_text("mine")


def link_to_notes(inputs: Path, run: Path) -> None:
    users_notes(inputs, run.parent / "elsewhere")
    run.symlink_to(run.parent / "elsewhere")


def within(name: str, content: str = "mine") -> Callable[[Path, Path], None]:
    """A user's file in a folder that jeagle would make."""

    def make(inputs: Path, run: Path) -> None:
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(content)

    return make


def in_a_run(name: str, content: str = "mine") -> Callable[[Path, Path], None]:
    """A run of jeagle's in which a file is the user's."""

    def make(inputs: Path, run: Path) -> None:
        shutil.copytree(inputs / "runs" / "mine", run)
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)

    return make


RUN_PLACES = {
    "a target's folder": users_target,
    "a folder with notes": users_notes,
    "a file": users_file,
    "below a file": file_above,
    "a link to a folder with notes": link_to_notes,
    "the source in data": within("data/chats.jsonl"),
    "a manifest of another program in data": within("data/manifest.json", '{"name": "app"}'),
    "notes in tables": within("tables/notes.txt"),
    "notes in stages": within("stages/notes.txt"),
    "answers": within("answers.jsonl", '{"messages": []}\n'),
    "a run whose data has notes": in_a_run("data/notes.txt"),
    "a run whose tables have notes": in_a_run("tables/notes.txt"),
    "a run with a target's config.json": in_a_run("config.json", '{"model_type": "llama"}'),
    "a run with broken settings": in_a_run("config.json", "{"),
    "a run with metrics of another program": in_a_run("metrics.jsonl", "epoch 1\n"),
    "a run with a report of another program": in_a_run("report.json", "[1]"),
    "a run with another draft.json": in_a_run("draft.json", "{}"),
    "a run with notes in an export": in_a_run("exports/sglang/notes.txt"),
    "a run with notes in its features": in_a_run("features/notes.txt"),
    "a run with answers of the user's": in_a_run("answers.jsonl", '{"messages": []}\n'),
    "a run with a note of the user's on a stage": in_a_run("stages/train.json", "{}"),
}


@pytest.mark.parametrize("place", RUN_PLACES)
@pytest.mark.parametrize("command", WRITE_RUNS)
def test_a_run_is_never_made_among_users_files(inputs, tmp_path, command, place):
    runs = tmp_path / "runs"
    RUN_PLACES[place](inputs, runs / "mine")
    said = refused(inputs, tmp_path, WRITE_RUNS[command](inputs, runs))
    assert str(runs) in said


def test_the_source_itself_may_lie_in_the_run(inputs, tmp_path):
    """Refused by the folder's name where it lies in data/; taken where it lies beside it in a run."""
    runs = tmp_path / "runs"
    source = runs / "mine" / "data" / "chats.jsonl"
    source.parent.mkdir(parents=True)
    shutil.copy(inputs / "chats.jsonl", source)
    assert str(runs / "mine") in refused(inputs, tmp_path, WRITE_RUNS["prepare"](inputs, runs, source))
    shutil.rmtree(runs)
    shutil.copytree(inputs / "runs" / "mine", runs / "mine")
    shutil.copy(inputs / "chats.jsonl", runs / "mine" / "own.jsonl")
    before = (runs / "mine" / "own.jsonl").read_bytes()
    WRITE_RUNS["prepare"](inputs, runs, runs / "mine" / "own.jsonl")()
    assert (runs / "mine" / "own.jsonl").read_bytes() == before


INPUTS_AT_FAULT = {
    "no target": ["--target.ref", "nowhere/at/all"],
    "no source": ["--data.source", "nowhere.jsonl"],
    "no vocabulary": ["--data.vocabulary", "nowhere"],
    "no draft to start from": ["--draft.start", "nowhere"],
    "no description": ["--draft.json", "nowhere.json"],
    "a tap too high": ["--target.aux-layers", "1", "2", "99"],
    "a width that heads do not divide": ["--draft.heads", "3", "--draft.kv-heads", "2"],
}


@pytest.mark.parametrize("fault", INPUTS_AT_FAULT)
def test_nothing_is_written_before_all_inputs_are_open(inputs, tmp_path, fault):
    flags = tiny.flags(inputs, runs=tmp_path / "runs", name="mine", train__steps=1)
    refused(inputs, tmp_path, lambda: train.main(["--config", RECIPE, *flags, *INPUTS_AT_FAULT[fault]]))
    assert not list(tmp_path.iterdir())


WRITE_FILES: dict[str, Callable[[Path, Path], list[str] | Any]] = {
    "bench": lambda inputs, out: bench.main(["--draft", str(inputs / "runs" / "mine"), "--out", str(out)]),
    "preview": lambda inputs, out: preview.main([str(inputs / "runs" / "mine"), "--html", str(out)]),
    "regenerate": lambda inputs, out: regenerate.main(
        ["--target", str(inputs / "target"), "--limit", "1", "--max-new-tokens", "1", "--out", str(out)]
    ),
}
FILE_PLACES: dict[str, Callable[[Path], Any]] = {
    "text": lambda out: out.write_text("mine"),
    "JSON": lambda out: out.write_text('{"mine": 1}'),
    "a list of JSON": lambda out: out.write_text("[1]"),
    "a page": lambda out: out.write_text("<!doctype html><html>mine</html>"),
    "chats": lambda out: out.write_text('{"id": "1", "messages": []}\n'),
    "answers without their note": lambda out: out.write_text('{"id": "1", "messages": [], "finish_reason": "stop"}\n'),
    "bytes": lambda out: out.write_bytes(bytes(range(256))),
    "an empty folder": lambda out: out.mkdir(),
    "a folder with notes": lambda out: users_notes(out, out),
    "below a file": lambda out: None,
    "a link that leads nowhere": lambda out: out.symlink_to(out.parent / "nowhere"),
}


@pytest.mark.parametrize("place", FILE_PLACES)
@pytest.mark.parametrize("command", WRITE_FILES)
def test_a_file_of_the_users_is_refused_by_its_name(inputs, tmp_path, command, place):
    out = tmp_path / "out.jsonl"
    FILE_PLACES[place](out)
    if place == "below a file":
        out.write_text("mine")
        out = out / "deep" / "out"
    assert str(out) in refused(inputs, tmp_path, lambda: WRITE_FILES[command](inputs, out))


@pytest.mark.parametrize("ending", [".partial", ".made_from.json", ".turns.jsonl", ".variety.json"])
def test_what_regenerate_writes_beside_its_file_may_be_the_users(inputs, tmp_path, ending):
    out = tmp_path / "out.jsonl"
    (tmp_path / f"out.jsonl{ending}").write_text("mine")
    arguments = ["--target", str(inputs / "target"), "--self-instruct", "2", "--out", str(out)]
    assert ending in refused(inputs, tmp_path, lambda: regenerate.main(arguments))


WRITE_FOLDERS: dict[str, Callable[[Path, Path], Any]] = {
    "to_sglang": lambda inputs, out: export.to_sglang(
        ["--checkpoint", str(inputs / "runs" / "mine"), "--out", str(out)]
    ),
    "to_vllm": lambda inputs, out: export.to_vllm(["--checkpoint", str(inputs / "runs" / "mine"), "--out", str(out)]),
    "from_eagle3": lambda inputs, out: import_draft.main([str(inputs), "--out", str(out)]),
    "extract": lambda inputs, out: of_run(extract.main, "--out", str(out))(inputs, out.parent / "runs")(),
    "from_speculators": lambda inputs, out: of_run(import_features.main, "--source", str(inputs), "--out", str(out))(
        inputs, out.parent / "runs"
    )(),
}
FOLDER_PLACES: dict[str, Callable[[Path], Any]] = {
    "notes": lambda out: users_notes(out, out),
    "a hidden folder": lambda out: users_notes(out, out / ".git"),
    "segments of another program": lambda out: within("segments/train-000000.x/data")(out, out),
    "a manifest of another program": lambda out: within("manifest.json", '{"name": "app"}')(out, out),
    "a store.json of another program": lambda out: within("store.json", '{"shop": 1}')(out, out),
    "an export with notes": lambda out: (
        within("jeagle_export.json", '{"engine": "vLLM", "layout": "plain"}')(out, out),
        (out / "notes.txt").write_text("mine"),
    ),
    "a file": lambda out: out.write_text("mine"),
}


@pytest.mark.parametrize("place", FOLDER_PLACES)
@pytest.mark.parametrize("command", WRITE_FOLDERS)
def test_a_folder_of_the_users_is_refused_by_its_name(inputs, tmp_path, command, place):
    out = tmp_path / "out"
    FOLDER_PLACES[place](out)
    assert str(out) in refused(inputs, tmp_path, lambda: WRITE_FOLDERS[command](inputs, out))


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_does_not_replace_a_users(inputs, tmp_path, name):
    (tmp_path / "report.json").write_text('{"lossless": true}')
    (tmp_path / name).write_text('{"mine": 1}')
    assert name in refused(inputs, tmp_path, lambda: report.main(["--run", str(tmp_path)]))


def test_what_jeagle_wrote_it_replaces(inputs, tmp_path):
    """The other half of the law: each of its own kinds is taken again, as one that a stopped process cut off is."""
    runs = tmp_path / "runs"
    shutil.copytree(inputs / "runs" / "mine", runs / "mine")
    (runs / "mine" / "my notes.txt").write_text("mine")
    config = run_config(inputs, runs)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.2))
    assert not dataset.prepare(config).reused
    assert (runs / "mine" / "my notes.txt").read_text() == "mine"
    for _ in range(2):
        preview.main([str(runs / "mine"), "--html", str(tmp_path / "page.html")])
    (tmp_path / "report.json").write_text('{"lossless": true}')
    for _ in range(2):
        report.main(["--run", str(tmp_path)])
    rows = jsonl_file("file of rows", "step")
    for text in ("", '{"step": 1}\n{"st', '{"step": 1'):
        (tmp_path / "rows").write_text(text)
        check_replaceable(tmp_path / "rows", rows)


def _replace_meanwhile(path: Path, kind: Output) -> None:
    with manifest.atomic_folder(path, kind) as aside:
        manifest.write_manifest(aside, {})
        users_notes(path, path)


def test_a_users_folder_that_comes_while_the_work_is_done_stays(tmp_path):
    kind = marked_folder("folder of a test", "manifest.json", json_file("manifest"), ("rows",))
    with pytest.raises(UserError, match="no folder of a test"):
        _replace_meanwhile(tmp_path / "f", kind)
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "notes.txt"]


def test_folders_made_for_a_write_that_fails_go_again(tmp_path):
    with pytest.raises(TypeError):
        manifest.atomic_write(tmp_path / "a" / "b" / "c", 3, json_file("file"))
    assert not list(tmp_path.iterdir())


def test_settings_of_a_run_are_known_by_their_fields(inputs):
    """Those that training writes, so that a run of which only config.json is left is one."""
    path = inputs / "settings.json"
    path.write_text(json.dumps(configs.to_json(run_config(inputs, inputs / "runs"))))
    check_replaceable(path, CONFIG)
    path.unlink()
