"""Rows, tables and files of a run that are damaged, edited, missing or of a later version are refused."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from jeagle import data, preview, targets, train
from jeagle import flags as configs
from jeagle.config import RunConfig, from_json, to_json
from jeagle.errors import UserError
from jeagle.run import assemble, dataset
from jeagle.run.draft_init import draft_spec
from jeagle.runtime import cli, disk
from jeagle.training.setup import Draft, write_folder
from tests import tiny

FLIPS = 120


def config_of(folder, **more):
    return configs.parse_overrides(RunConfig(name="x"), tiny.flags(folder, **more), program="x", description="x")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose rows and tables are made, with a checkpoint's folder and what training writes beside it."""
    config = config_of(tmp_path_factory.mktemp("damaged"))
    dataset.prepare(config)
    target = targets.read_spec(targets.open_weights(targets.resolve(config.target.ref)).config)
    spec = draft_spec(config, target, 100, ())
    tables = json.loads((config.folder / "tables" / "manifest.json").read_text())
    write_folder(config, Draft(spec, None, None, None, {"draft": spec.to_json(), "made_from": {"tables": tables}}), [])
    (config.folder / "checkpoints" / "2").mkdir(parents=True)
    shutil.copytree(config.folder, config.folder.with_name("whole"))
    return config


@pytest.fixture
def run(whole):
    shutil.rmtree(whole.folder)
    shutil.copytree(whole.folder.with_name("whole"), whole.folder)
    return whole


def read(config):
    """What training reads: rows, tables and counts."""
    prepared = dataset.prepare(config)
    arrays = {name: data.load_rows(prepared.data / name, 315) for name in ("train", "held_out")}
    found = {f"{name} {part}": np.array(a) for name, rows in arrays.items() for part, a in rows._asdict().items()}
    found |= {name: np.load(prepared.data / name / "counts.npy") for name in arrays}
    return found | {"ids": data.load_tables(prepared.tables), "texts": (prepared.data / "held_out.jsonl").read_bytes()}


def test_a_flipped_bit_in_rows_or_tables_is_noticed_or_changes_nothing(run, whole, capsys):
    good, chance, noticed = read(run), random.Random(0), 0
    files = [
        p
        for name in ("data", "tables")
        for p in sorted((run.folder / name).rglob("*"))
        if p.is_file() and p.stat().st_size
    ]
    for number in range(FLIPS):
        path = files[number % len(files)]
        before = path.read_bytes()
        content = bytearray(before)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = read(run)
        except UserError:
            noticed += 1
        else:
            assert found.keys() == good.keys()
            assert all(np.array_equal(found[name], good[name]) for name in good), path
        shutil.rmtree(run.folder)
        shutil.copytree(whole.folder.with_name("whole"), run.folder)
    assert noticed > FLIPS / 2


def change(path, place, value):
    array = np.load(path, mmap_mode="r+")
    array[place] = value
    array.flush()


NUMBERS = {"tokens": (315, -1, 2**31 - 1), "segments": (-1, 65), "positions": (64, -2)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_that_no_row_can_have_are_refused_where_there_is_no_checksum(run, name, value):
    """Rows of earlier versions have none."""
    path = run.folder / "data" / "train" / f"{name}.npy"
    change(path, (2, 3), value)
    with pytest.raises(UserError, match=rf"train/{name}\.npy is damaged or was edited"):
        dataset.prepare(run)
    with pytest.raises(UserError, match=rf"Row 2 in .*train has a number in {name}\.npy"):
        data.RowStream(path.parent, 8, 0, vocab=315)


@pytest.mark.parametrize("length", [0, 60, 1000])
def test_rows_that_are_cut_short_are_refused(run, length):
    path = run.folder / "data" / "train" / "segments.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="cannot be read"):
        data.load_rows(path.parent)


def test_rows_are_verified_before_they_are_shown(run):
    change(run.folder / "data" / "train" / "tokens.npy", (0, 0), 7)
    with pytest.raises(UserError, match=r"tokens\.npy is damaged"):
        preview.main([str(run.folder)])


def edited(name, edit):
    def damage(folder):
        tree = json.loads((folder / name).read_text())
        edit(tree)
        (folder / name).write_text(json.dumps(tree))

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


DAMAGES = {
    "another seed": (edited("config.json", lambda tree: tree["train"].update(seed=5)), "was edited or damaged"),
    "another loss": (edited("config.json", lambda tree: tree["objective"].update(loss="kl")), "was edited or damaged"),
    "a cut config": (cut("config.json"), "config.json is"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "an empty config": (written("config.json", b""), "config.json is"),
    "a list": (written("config.json", b"[]"), "config.json is"),
    "a number": (written("config.json", b'{"name": "x", "train": 3}'), "config.json is"),
    "no text": (written("config.json", b"\xff\xfe"), "config.json is"),
    "a later version": (edited("config.json", lambda tree: tree.update(colour=1)), "does not know: colour"),
    "a cut description": (cut("draft.json"), "draft.json is"),
    "no description": (lambda folder: (folder / "draft.json").unlink(), "draft.json"),
    "an empty description": (written("draft.json", b"{}"), "draft.json is"),
    "a later draft": (edited("draft.json", lambda tree: tree["draft"].update(experts=8)), "another version of jeagle"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_files_are_damaged_is_refused_in_one_sentence(run, damage, monkeypatch, capsys):
    change, said = DAMAGES[damage]
    change(run.folder)
    flags = tiny.flags(run.folder.parents[1], name=run.name)
    monkeypatch.setattr("sys.argv", ["train", *flags, *(["--train.seed", "5"] if damage == "another seed" else [])])
    with pytest.raises(SystemExit, match="2"):
        cli.run(train.main)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    with pytest.raises(UserError):  # bench and export read both
        assemble.read_config(run.folder), assemble.described_draft(run.folder)


def test_a_configuration_without_a_checksum_is_read(run):
    """As those of earlier versions are."""
    (run.folder / "config.json").write_text(json.dumps(to_json(run)))
    assert assemble.read_config(run.folder) == run == from_json(assemble.sealed(to_json(run)))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "a"), OSError(122, "Disk quota exceeded")])
def test_a_full_disk_anywhere_is_one_sentence_with_numbers(error, monkeypatch, capsys):
    def main(arguments):
        raise error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: A file cannot be written") and "B free: make room" in said[0]


def test_memory_that_is_full_is_no_full_disk():
    assert not disk.is_full(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes"))
    assert disk.is_full(ValueError("RESOURCE_EXHAUSTED: Error writing"))
