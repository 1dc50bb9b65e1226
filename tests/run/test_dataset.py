"""The prepare stage: made once, made anew when and only when what it depends on changes, whole or absent."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jeagle import flags as configs
from jeagle.config import RunConfig
from jeagle.data import load_rows, load_tables, preparation, unpack
from jeagle.errors import UserError
from jeagle.run import dataset
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def prepare(folder, **changes) -> dataset.Prepared:
    base = RunConfig(name="tiny")
    flags = tiny.flags(folder, **changes)
    return dataset.prepare(configs.parse_overrides(base, flags, program="test", description=""))


def stamps(folder) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_ino for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_call_finds_what_the_first_made(folder):
    first = prepare(folder)
    before = stamps(first.data.parent)
    second = prepare(folder)
    assert second.reused and second.statistics == first.statistics and stamps(second.data.parent) == before
    assert "reused" in dataset.describe(second)[0]


def test_another_draft_vocabulary_renders_nothing(folder):
    before = stamps(prepare(folder).data)
    smaller = prepare(folder, draft__vocab=40)
    after = stamps(smaller.data)
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]  # it names the vocabulary
    assert len(load_tables(smaller.tables)) == 40
    assert any("--draft.vocab" in line for line in dataset.describe(smaller)) == (
        smaller.statistics["coverage_train"] < 0.95
    )


def test_the_manifest_names_the_vocabulary_and_its_coverage(folder):
    prepared = prepare(folder, draft__vocab=40)
    named = json.loads((prepared.data / "manifest.json").read_text())["vocabulary"]
    ids, counts = load_tables(prepared.tables), np.load(prepared.data / "train" / "counts.npy")
    assert named["ids"] == json.loads((prepared.tables / "manifest.json").read_text())["ids"]
    assert named["draft_vocab"] == 40 and named["coverage_train"] == round(counts[ids].sum() / counts.sum(), 4)
    other = prepare(folder, draft__vocab=41)
    assert json.loads((other.data / "manifest.json").read_text())["vocabulary"]["ids"] != named["ids"]


def test_a_change_is_named_and_made_anew(folder, capsys):
    prepare(folder)
    capsys.readouterr()
    longer = prepare(folder, data__row_length=96)
    assert not longer.reused and "row_length changed" in capsys.readouterr().out
    assert load_rows(longer.data / "train").tokens_BT.shape[1] == 96


def test_statistics_and_counts_are_those_of_the_rows(folder):
    prepared = prepare(folder)
    held_out = [json.loads(line) for line in (prepared.data / "held_out.jsonl").read_text().splitlines()]
    rows = {name: load_rows(prepared.data / name) for name in ("train", "held_out")}
    for name, found in rows.items():
        stated = prepared.statistics[name]
        assert stated["documents"] == len(unpack(found)) and stated["tokens"] == (found.segments_BT > 0).sum()
        counts = np.load(prepared.data / name / "counts.npy")
        assert counts.sum() == stated["supervised_tokens"] == found.supervised_BT.sum()
    assert len(held_out) == prepared.statistics["held_out"]["documents"] > 0
    training = {tuple(d.ids.tolist()) for d in unpack(rows["train"])}
    assert training.isdisjoint(tuple(d.ids.tolist()) for d in unpack(rows["held_out"]))


def test_a_failure_leaves_what_was_there(folder, monkeypatch):
    prepared = prepare(folder)
    before = stamps(prepared.data)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation.SplitWriter, "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, data__row_length=128)
    assert stamps(prepared.data) == before
    assert not list(prepared.data.parent.glob(".*"))


def test_nothing_is_left_when_the_source_is_wrong(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        prepare(tmp_path, name="wrong", data__source=tmp_path / "none.jsonl")
    assert not (tmp_path / "runs" / "wrong" / "data").exists()


CHANGES = {
    "max_conversations": 50,
    "long": "split",
    "held_out": 0.2,
    "bad_share": 0.02,
    "near_duplicates": "drop",
    "system_prompt": "be old",
    "reasoning": "drop",
    "thinking": "off",
    "rewritten": "reject",
    "template_arguments": '{"date_string": "today"}',
}


def test_every_setting_that_shapes_rows_is_named_when_it_changes(tmp_path, capsys):
    prepare(tmp_path)
    for name, value in CHANGES.items():
        capsys.readouterr()
        assert not prepare(tmp_path, **{f"data__{name}": value}).reused
        assert name in capsys.readouterr().out
    assert {*CHANGES, "row_length"} == set(dataset._SHAPING)


def test_named_columns_shape_the_rows_and_old_rows_have_none():
    plain = RunConfig(name="t")
    named = dataclasses.replace(plain, data=dataclasses.replace(plain.data, columns="chat=talk"))
    assert dataset.shaping(named) == dataset.shaping(plain) | {"columns": "chat=talk"}
    assert "columns" not in dataset.shaping(plain)
