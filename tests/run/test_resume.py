"""What may change when a run goes on: the table is whole, the page agrees, and a refused command touches nothing."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jeagle import flags as configs
from jeagle import pipeline, prepare, preview, train
from jeagle.config import RunConfig, from_json, to_json
from jeagle.errors import UserError
from jeagle.run import dataset, resume
from jeagle.training import setup
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")
PAGE = Path(__file__).parents[2] / "docs" / "resuming.md"
FIELDS = [path.replace("-", "_") for path in configs.field_paths()]


def tree(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of a tiny run with a checkpoint of step 1, `runs/tiny` in it."""
    folder = tmp_path_factory.mktemp("begun")
    train.main(flags_of(folder))
    return folder


@pytest.fixture
def folder(begun, tmp_path) -> Path:
    """A copy of it, which a test may change; its settings name the copy's target and data."""
    return Path(shutil.copytree(begun, tmp_path / "copy"))


def flags_of(folder: Path, **more: Any) -> list[str]:
    settings = {"train__steps": 1, "train__batch_rows": 2, "train__ema": 0.9, "draft__ttt_steps": 1}
    return tiny.flags(folder, **settings | more)


def config_of(folder: Path, **more: Any) -> RunConfig:
    return configs.from_command_line(flags_of(folder, **more), program="", description="")


def other_value(old: Any) -> Any:
    if isinstance(old, bool) or old is None:
        return not old
    return (*old, "x") if isinstance(old, tuple) else old + ("x" if isinstance(old, str) else 1)


def with_field(config: RunConfig, field: str, value: Any) -> RunConfig:
    group, _, name = field.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


def value_of(config: RunConfig, field: str) -> Any:
    for name in field.split("."):
        config = getattr(config, name)
    return config


def page_kinds() -> dict[str, str]:
    """The kind of each setting, by the page's table: a row names settings, or the rest of a group as `group.*`."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([a-z ]+) \|", PAGE.read_text(), re.MULTILINE)
    named = {name: kind for names, kind in rows for name in re.findall(r"`([^`]+)`", names)}
    unknown = [name for name in named if name not in FIELDS and name.removesuffix(".*") not in vars(RunConfig)]
    assert not unknown
    return {field: named.get(field) or named[f"{field.split('.')[0]}.*"] for field in FIELDS}


def test_every_setting_has_an_entry_and_the_page_says_the_same():
    for name in resume.ON_RESUME:  # no entry is of a setting that has gone
        assert any(field == name or field.startswith(f"{name}.") for field in FIELDS), name
    assert page_kinds() == {field: resume.kind_of(field) for field in FIELDS}
    assert set(resume.BY_CONTENT) <= set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_another_value_does_what_the_table_says(field):
    """The settings of a run that uses them all, one changed at a time."""
    used = with_field(with_field(RunConfig(name="x"), "regenerate.live", True), "features", "auto")
    used = with_field(with_field(used, "train.ema", 0.9), "train.clip", 0.7)
    changed = with_field(used, field, other_value(value_of(used, field)))
    found = resume.changes(from_json(to_json(used)), changed)
    assert [change.field for change in found] == [field]
    expected = resume.FREE if field in resume.BY_CONTENT else resume.kind_of(field)
    switched_off = field == "regenerate.live"  # the answers are no data of this run any more
    assert found[0].kind == (resume.FREE if switched_off else expected)
    assert re.fullmatch(rf"{re.escape(field)} was .+ and is .+", str(found[0]))


def test_settings_that_are_not_used_are_free_and_zero_is_another_state():
    plain = RunConfig(name="x")
    for field, value in (("store.aux_dtype", "fp8"), ("regenerate.temperature", 1.0), ("regenerate.live", True)):
        [change] = resume.changes(plain, with_field(plain, field, value))
        assert change.kind == (resume.DATA if field == "regenerate.live" else resume.FREE), field
    for field in ("train.ema", "train.clip"):
        some, none = (with_field(plain, field, value) for value in (0.9, 0.0))
        assert [c.kind for c in (*resume.changes(some, none), *resume.changes(none, some))] == [resume.RUN] * 2
    assert resume.changes(plain, with_field(plain, "data.held_out", 0.02)) == []
    assert resume.changes(with_field(plain, "data.held_out", 0), with_field(plain, "data.held_out", 0.0)) == []


def other_source(folder: Path) -> None:
    with open(folder / "chats.jsonl", "a") as file:
        file.write('{"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}]}\n')


def other_target(folder: Path) -> None:
    path = folder / "target" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 20000.0}))


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "batch": ({"train__batch_rows": 4}, None, r"train\.batch_rows was 2 and is 4"),
    "loss": ({"objective__loss": "hard_ce"}, None, r'objective\.loss was null and is "hard_ce"'),
    "row length": ({"data__row_length": 96}, None, r"data\.row_length was 64 and is 96"),
    "vocabulary": ({"draft__vocab": 90}, None, r"draft\.vocab was 100 and is 90"),
    "two settings": ({"draft__width": 16, "train__seed": 3}, None, r"draft\.width was 0 and is 16; train\.seed"),
    "source": ({}, other_source, "the content of data.source was .* and is "),
    "target": ({}, other_target, "the content of target.ref was .* and is "),
    "template": ({"data__template": "vicuna"}, None, "the chat template was .* and is "),
    "no average": ({"train__ema": 0.0}, None, r"train\.ema was 0\.9 and is 0\.0"),
    "batch of no device": ({"train__batch_rows": 2, "mesh__fsdp": 3}, None, "does not fit 1 devices"),
    "aux layers": ({"target__aux_layers": 99}, None, r"target\.aux_layers was \[\] and is \[99\]"),
}


def refused(folder: Path, call: Any) -> str:
    before = tree(folder)
    with pytest.raises(UserError) as error:
        call()
    assert tree(folder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("command", [train, pipeline], ids=["train", "pipeline"])
def test_a_refused_relaunch_touches_nothing_and_names_both_values(folder, why, command):
    settings, change, said = REFUSED[why]
    if change:
        change(folder)
    # The run was begun in another folder; what its files hold is the same.
    message = refused(folder, lambda: command.main(flags_of(folder, **settings)))
    assert re.search(said, message), message
    assert "does not fit" in said or ("--fresh, which moves" in message and "tiny.1" in message)


@pytest.mark.parametrize("why", ["row length", "source", "template", "vocabulary"])
def test_prepare_keeps_the_rows_that_a_draft_was_trained_on(folder, why):
    settings, change, _ = REFUSED[why]
    if change:
        change(folder)
    refused(folder, lambda: prepare.main(flags_of(folder, **settings)))


def test_fewer_steps_than_were_made_are_refused(folder):
    shutil.move(folder / "runs/tiny/checkpoints/1", folder / "runs/tiny/checkpoints/5")
    message = refused(folder, lambda: train.main(flags_of(folder)))
    assert "has made 5 steps, and these settings ask for 1: give more --train.steps" in message


@pytest.mark.parametrize("steps", [{"train__steps": 1}, {"train__steps": 0, "train__epochs": 0.0001}])
def test_what_changes_the_rest_of_the_training_is_refused_where_no_step_remains(folder, steps):
    (folder / "runs/tiny/config.json").write_text(json.dumps(to_json(config_of(folder, **steps))))
    message = refused(folder, lambda: train.main(flags_of(folder, **steps, train__learning_rate=0.5)))
    assert "has made 1 steps" in message and "train.learning_rate was 0.0001 and is 0.5" in message


def test_a_damaged_description_is_refused_and_stays(folder):
    for name in ("config.json", "draft.json"):
        path = folder / "runs" / "tiny" / name
        whole = path.read_text()
        path.write_text(re.sub(r'"(vocab|heads)": \d+', r'"\1x": 1', whole))
        refused(folder, lambda: train.main(flags_of(folder)))
        path.write_text(whole)


def test_other_paths_to_the_same_files_go_on_and_what_may_change_is_told(folder, monkeypatch, capsys):
    """A real relaunch: from another working directory, renamed, for more steps, on rows that an older jeagle made."""
    made = folder / "runs/tiny/data/manifest.json"
    for path, place in ((made, ()), (folder / "runs/tiny/draft.json", ("made_from", "data"))):
        content = json.loads(path.read_text())
        inner = content
        for name in place:
            inner = inner[name]
        (inner if place else content["made_from"])["version"] = "0.0.1"
        path.write_text(json.dumps(content))
    monkeypatch.chdir(folder)
    shutil.move("runs/tiny", "runs/renamed")
    rows = tree(folder / "runs/renamed/data")
    more = {"name": "renamed", "runs": "runs", "target__ref": "target/", "data__source": "chats.jsonl"}
    train.main(flags_of(folder, **more, train__steps=2, train__log_every=2, train__schedule="constant"))
    said = capsys.readouterr().out
    assert "goes on from step 1" in said and "train.steps was 1 and is 2" in said
    assert 'train.schedule was "cosine" and is "constant"' in said and "train.log_every was 1 and is 2" in said
    assert tree(folder / "runs/renamed/data") == rows
    assert resume.last_step(folder / "runs/renamed") == 2


def test_what_needs_no_data_is_checked_before_any_row_is_made(begun, tmp_path, monkeypatch):
    """In training and in the pipeline, before the target answers a prompt."""
    wrong = {
        "mesh": ({"mesh__fsdp": 3}, "does not fit 1 devices"),
        "parts": ({"objective__loss": "lk_step", "train__accumulate": 2}, "would change the loss"),
        "loss": ({"objective__loss": "x"}, "x"),
        "aux layers": ({"target__aux_layers": 99}, "99"),
        "engine": ({"draft__layers": 2}, "SGLang could not serve"),
        "store": ({"features": "auto", "store__teacher": "top_k", "store__top_k": 9999}, "more than the target's"),
        "no store": ({"features": tmp_path / "none"}, "There is no store"),
        "start": ({"draft__start": tmp_path / "none"}, "is no folder"),
    }

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    for module, name in ((dataset.room, "prepare_rows"), (pipeline, "regenerate"), (pipeline, "prepare")):
        monkeypatch.setattr(module, name, fail)
    for settings, said in wrong.values():
        for command in (train, pipeline):
            with pytest.raises(UserError, match=re.escape(said)):
                command.main(flags_of(begun, name="new", **settings))
    assert not (begun / "runs" / "new").exists()


def test_a_vocabulary_without_room_for_the_end_tokens_is_refused_before_any_row_is_made(folder):
    (folder / "target" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3]}))
    message = refused(folder, lambda: prepare.main(flags_of(folder, name="new", draft__vocab=2)))
    assert "too small for the 3 end tokens" in message


@pytest.mark.parametrize("flag", ["--fresh", "--no-resume-from-checkpoint"])
def test_fresh_moves_the_run_aside_whole(folder, flag, monkeypatch, capsys):
    run = folder / "runs" / "tiny"
    (folder / "runs" / "tiny.1").mkdir()
    before, trained = tree(run), []
    monkeypatch.setattr(train, "train", lambda config, inputs: trained.append(inputs))
    train.main([*flags_of(folder, data__row_length=96), flag])
    assert tree(folder / "runs" / "tiny.2") == before
    assert f"{run} was moved to {run}.2" in capsys.readouterr().out
    assert trained and resume.last_step(run) is None
    assert not (folder / "runs/tiny.2/.writer.lock").exists()
    assert json.loads((run / "data/manifest.json").read_text())["made_from"]["row_length"] == 96


def test_fresh_moves_nothing_where_the_new_run_is_refused_or_the_old_one_is_in_use(folder):
    assert "does not fit" in refused(folder, lambda: train.main([*flags_of(folder, mesh__fsdp=3), "--fresh"]))
    held = os.open(folder / "runs/tiny/.writer.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)  # as another process holds it
    assert "is in use by another process" in refused(folder, lambda: train.main([*flags_of(folder), "--fresh"]))
    os.close(held)


def test_a_vocabulary_above_the_targets_is_clipped_with_a_word(begun, tmp_path, capsys):
    config = config_of(begun, runs=tmp_path, name="whole", draft__vocab=9999)
    prepared = dataset.prepare(config)
    vocab = len(np.load(prepared.tables / "t2d.npy"))
    assert f"--draft.vocab 9999 is clipped to the {vocab} tokens of the target" in capsys.readouterr().out
    preview.main([str(config.folder)])
    assert re.search(rf"draft vocabulary +{vocab} tokens cover 100\.00%", capsys.readouterr().out)
    setup.check_run(config)
