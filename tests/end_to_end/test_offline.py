"""Extracting and training from a store, as a user does it, on a tiny target: the same losses, and what is refused."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jeagle import features
from jeagle import flags as configs
from jeagle import store as storing
from jeagle.errors import UserError
from jeagle.extraction import fill
from jeagle.features import reader
from jeagle.run import assemble
from jeagle.runtime.checkpoints import load_named
from jeagle.train import train
from jeagle.training.held_out import spread
from tests import tiny
from tests.features import random_store

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "llama3_8b.py")
STEPS, VOCAB = 4, 315


def config_of(folder: Path, **more):
    settings = {"train__steps": STEPS, "train__save_every": 2, "draft__ttt_steps": 2} | more
    return configs.from_command_line(["--config", RECIPE, *tiny.flags(folder, **settings)], program="", description="")


def run(folder: Path, **more) -> list[dict]:
    """Trains, and returns what was logged of every step."""
    config = config_of(folder, **more)
    train(config)
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("offline")


@pytest.fixture(scope="module")
def stores(folder) -> dict[str, Path]:
    """One store exact, one in bytes."""
    paths = {kind: folder / kind for kind in ("float32", "int8")}
    for kind, path in paths.items():
        config = config_of(folder, name="extract", store__aux_dtype=kind, store__last_dtype=kind, store__segment_mb=1)
        fill.extract(config, str(path))
    return paths


@pytest.fixture(scope="module")
def online(folder) -> list[dict]:
    return run(folder, name="online", train__held_out_rows=100)


def held_out(config) -> list[dict]:
    return [json.loads(line) for line in (config.folder / "held_out" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def elsewhere(folder, stores) -> Path:
    """A machine with the exact store, and neither the target nor the data."""
    other = folder / "elsewhere"
    shutil.copytree(stores["float32"], other / "store")
    return other


def test_an_exact_store_gives_the_online_losses_without_the_target(folder, online, stores, elsewhere):
    config = config_of(
        folder, name="alone", runs=elsewhere / "runs", features=elsewhere / "store", train__held_out_rows=100
    )
    target, chats = folder / "target", folder / "chats.jsonl"
    target.rename(folder / "away"), chats.rename(folder / "away.jsonl")
    try:
        train(config)
    finally:
        (folder / "away").rename(target), (folder / "away.jsonl").rename(chats)
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "gradient_norm", "accuracy_0", "acceptance_1"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in online], rtol=2e-6)
    ours, theirs = held_out(config), held_out(config_of(folder, name="online"))
    assert [row["step"] for row in ours] == [2, 4] == [row["step"] for row in theirs]
    assert ours[1]["loss_0"] < ours[0]["loss_0"]
    for name in ours[0]:
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=2e-6)
    for name in ("tokens.npy", "segments.npy", "positions.npy", "supervised.npy", "counts.npy"):
        ours, theirs = (f / "data" / "train" / name for f in (config.folder, folder / "runs" / "online"))
        np.testing.assert_array_equal(np.load(ours), np.load(theirs))


def test_a_resumed_run_has_the_figures_of_held_out_rows_once(folder, online):
    """Killed after a checkpoint and before its evaluation: that is made up for, and the rest trained as ever."""
    config = config_of(folder, name="resumed", train__held_out_rows=100)
    shutil.copytree(folder / "runs" / "online", config.folder)
    tree = json.loads((config.folder / "config.json").read_text()) | {"name": "resumed"}
    (config.folder / "config.json").write_text(json.dumps(tree))
    shutil.rmtree(config.folder / "checkpoints" / "4")
    (config.folder / "held_out" / "metrics.jsonl").unlink()
    train(config)
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == [r["loss"] for r in online]
    assert held_out(config) == held_out(config_of(folder, name="online"))


def test_a_run_whose_newest_checkpoint_is_damaged_is_one_that_never_had_it(folder, online, capsys):
    config = config_of(folder, name="damaged", train__held_out_rows=100)
    shutil.copytree(folder / "runs" / "online", config.folder)
    for path in (config.folder / "checkpoints" / "4").rglob("d/*"):
        path.write_bytes(bytes(len(path.read_bytes())))
    train(config)
    assert "step 2 is used" in capsys.readouterr().out
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in online]
    assert held_out(config) == held_out(config_of(folder, name="online"))
    ours, theirs = (load_named(c.folder / "checkpoints", 4)[1] for c in (config, config_of(folder, name="online")))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert (config.folder / "damaged" / "checkpoint_4.0").is_dir()


def test_few_held_out_rows_are_taken_from_all_over_them():
    assert spread(10, 4).tolist() == [0, 2, 5, 7] and spread(3, 64).tolist() == [0, 1, 2] and not spread(0, 64).size


def test_a_store_in_bytes_comes_close(folder, online, stores, capsys):
    rows = run(folder, name="bytes", features=stores["int8"])
    np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in online], rtol=0.02)
    assert rows[0]["loss"] != online[0]["loss"]
    assert "the target's argmax is the stored one at 100.0%" in capsys.readouterr().out


@pytest.fixture(scope="module")
def likeliest(folder) -> Path:
    """A store of as many likeliest tokens as there are."""
    flags = {"store__aux_dtype": "float32", "store__teacher": "top_k", "store__top_k": VOCAB}
    fill.extract(config_of(folder, name="extract", **flags), str(folder / "likeliest"))
    return folder / "likeliest"


def test_a_store_of_every_likely_token_gives_the_online_losses(folder, online, likeliest, capsys):
    """Within the rounding of its log-probabilities, on another mesh and in parts; and says what it holds."""
    split = {"mesh__tensor": 2, "train__accumulate": 2}
    rows = run(folder, name="likeliest", features=likeliest, train__held_out_rows=100, **split)
    assert "the likeliest stored tokens are the stored argmax at 100.0%" in capsys.readouterr().out
    for name in ("loss", "gradient_norm", "acceptance_1"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in online], rtol=1e-3, err_msg=name)
    np.testing.assert_allclose([r["accuracy_0"] for r in rows], [r["accuracy_0"] for r in online], atol=0.01)
    assert storing.main(["verify", str(likeliest), "--target", str(folder / "target")]) == 0
    storing.main(["info", str(likeliest)])
    said = capsys.readouterr().out
    assert f"the {VOCAB} likeliest tokens, at" in said and "stored as float32" in said
    assert storing.main(["sample", str(likeliest), "--rows", "1"]) == 0


def test_what_a_store_cannot_teach_is_refused(folder, stores, likeliest, monkeypatch):
    with pytest.raises(UserError, match=f"The store {likeliest} contains .*the loss reverse_kl is infinite"):
        train(config_of(folder, name="cannot", features=likeliest, objective__loss="reverse_kl"))
    with pytest.raises(UserError, match="The store that these settings make contains only the 256 likeliest tokens"):
        fill.extract(
            config_of(folder, name="cannot", store__teacher="top_k", objective__loss="reverse_kl"), str(folder / "none")
        )
    with pytest.raises(UserError, match=rf"--store.top-k 1000 is more than the target's {VOCAB} tokens"):
        fill.extract(config_of(folder, name="extract", store__teacher="top_k", store__top_k=1000), str(folder / "none"))
    with pytest.raises(UserError, match=r"arrays.last, arrays.teacher differ"):
        train(config_of(folder, name="mixed3", features=f"{stores['float32']},{likeliest}"))
    read = reader.Store.stored

    def other(self, split, rows, batch, stays):
        found = read(self, split, rows, batch)
        ids = found.teacher.ids_BTP
        turned = np.concatenate([ids[..., :stays], ids[..., stays:][..., ::-1]], axis=-1)
        return found._replace(teacher=found.teacher._replace(ids_BTP=turned))

    monkeypatch.setattr(reader.Store, "stored", functools.partialmethod(other, stays=0))
    with pytest.raises(UserError, match="contradicts itself"):
        train(config_of(folder, name="contradicts", features=likeliest, store__check_rows=0))
    monkeypatch.setattr(reader.Store, "stored", functools.partialmethod(other, stays=1))
    with pytest.raises(UserError, match="of their mass lies elsewhere"):
        train(config_of(folder, name="contradicts", features=likeliest))


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The targets that are loaded while the test runs."""
    loaded, load_target = [], assemble.load_target

    def counted(config, mesh, **settings):
        loaded.append(config.target.ref)
        return load_target(config, mesh, **settings)

    monkeypatch.setattr(assemble, "load_target", counted)
    return loaded


def test_auto_fills_a_store_of_its_own_and_goes_on_with_it(folder, stores, loads):
    """The target is loaded once to fill the store, and once to check rows of a store that was there already."""
    rows = run(folder, name="auto", features="auto")
    assert len(loads) == 1
    assert [r["loss"] for r in run(folder, name="auto", features="auto")] == [r["loss"] for r in rows]
    assert len(loads) == 2
    run(folder, name="auto", features="auto", store__check_rows=0)
    assert len(loads) == 2
    with pytest.raises(UserError, match=r"does not fit this run: arrays.taps differs"):
        run(folder, name="auto", features="auto", store__aux_dtype="float32")
    same = run(folder, name="named", features=stores["int8"], store__check_rows=0)
    assert [r["loss"] for r in rows] == [r["loss"] for r in same]
    features.Store(str(folder / "runs" / "auto" / "features")).check_complete()


def test_two_stores_are_read_one_after_the_other(folder, stores):
    same = shutil.copytree(stores["int8"], folder / "int8 again")
    config = config_of(folder, name="mixed", features=f"{stores['int8']},{same}", store__check_rows=0)
    train(config)
    tokens = np.load(config.folder / "data" / "train" / "tokens.npy")
    half = len(tokens) // 2
    np.testing.assert_array_equal(tokens[:half], tokens[half:])
    with pytest.raises(UserError, match=r"arrays.last, arrays.taps differ"):
        train(config_of(folder, name="mixed2", features=f"{stores['int8']},{stores['float32']}"))


def other_weights(folder: Path) -> Path:
    if not (folder / "other").is_dir():
        tiny.write_target(folder / "other", rope_theta=500.0)
    return folder / "other"


REFUSED = {
    "template": ({"data__template": "llama3"}, "data.template"),
    "taps": ({"target__aux_layers": "1 2 3"}, "taps"),
    "dtype": ({"target__dtype": "bfloat16"}, "target.dtype"),
    "quantisation": ({"target__weights": "int8"}, "target.weights"),
    "row length": ({"data__row_length": 32}, "data.row_length"),
    "system prompt": ({"data__system_prompt": "Be brief."}, "data.system_prompt"),
}


@pytest.mark.parametrize(("changed", "field"), REFUSED.values(), ids=REFUSED.keys())
def test_a_store_made_otherwise_is_refused_by_name(folder, stores, changed, field):
    flags = tiny.flags(folder, name="refused", features=stores["float32"], **changed)
    flags = [part for flag in flags for part in (flag.split() if flag == "1 2 3" else [flag])]
    config = configs.from_command_line(["--config", RECIPE, *flags], program="", description="")
    with pytest.raises(UserError, match=rf"does not fit this run: (.*, )?{field}(, .*)? differs? \("):
        train(config)


def test_another_target_is_refused(folder, stores):
    with pytest.raises(UserError, match=r"target.fingerprint differs"):
        train(config_of(folder, name="refused", features=stores["float32"], target__ref=other_weights(folder)))
    with pytest.raises(UserError, match=r"target.reference differs"):
        train(config_of(folder, name="refused", features=stores["float32"], target__ref="org/another"))
    with pytest.raises(UserError, match=r"does not fit this run: target.fingerprint"):
        fill.extract(
            config_of(
                folder,
                name="e",
                target__ref=other_weights(folder),
                store__aux_dtype="float32",
                store__last_dtype="float32",
            ),
            str(stores["float32"]),
        )


def test_states_from_before_the_norm_are_noticed(folder, stores, tmp_path):
    """A store whose `last` is not what its head reads contradicts its own argmax."""
    config = config_of(folder, name="contradicts", features=stores["float32"], store__check_rows=0)
    read = reader.Store.stored

    def shuffled(self, split, rows, batch):
        found = read(self, split, rows, batch)
        return found._replace(teacher=found.teacher._replace(values=found.teacher.values[..., ::-1].copy()))

    reader.Store.stored = shuffled
    try:
        with pytest.raises(UserError, match="contradicts itself"):
            train(config)
    finally:
        reader.Store.stored = read


def test_a_flipped_byte_is_found_by_verify_and_in_training(folder, stores, place, capsys):
    """On disk and in object storage alike; what is made again is trained from."""
    there = features.Storage(place)
    kind = "on disk" if there.path else "in a bucket"
    for path in stores["int8"].rglob("*"):
        if path.is_file():
            there.write(str(path.relative_to(stores["int8"])), path.read_bytes())
    assert storing.main(["verify", place]) == 0
    with pytest.raises(UserError, match=r"does not fit this run: data.template differs"):
        train(config_of(folder, name="refused", features=place, data__template="llama3"))
    key = random_store.find(place, "segments/train-*/taps/c/0/0/0")
    data = bytearray(there.read(key))
    data[len(data) // 2] ^= 1
    there.write(key, bytes(data))
    with pytest.raises(UserError, match="1 of .* segments .* are damaged"):
        storing.main(["verify", place])
    with pytest.raises(UserError, match=r"damaged: taps of segment train-00000"):
        train(config_of(folder, name=f"damaged {kind}", features=place, store__check_rows=0))
    assert storing.main(["prune", place, "--damaged"]) == 0
    with pytest.raises(UserError, match="rows are missing"):
        train(config_of(folder, name=f"damaged {kind}", features=place))
    config = config_of(folder, name="extract", store__segment_mb=1)
    fill.extract(config, place)
    assert storing.main(["verify", place, "--target", str(folder / "target")]) == 0
    assert "the argmax agrees at 100.00%" in capsys.readouterr().out
    again, same = (
        run(folder, name=f"{kind} {source is place}", features=source, store__check_rows=0)
        for source in (place, stores["int8"])
    )
    assert [r["loss"] for r in again] == [r["loss"] for r in same]


def test_two_processes_fill_one_store(folder, stores):
    """What each process computes of its own units is what one process computes."""
    flags = tiny.flags(folder, name="two", store__aux_dtype="float32", store__last_dtype="float32", store__segment_mb=1)
    command = [sys.executable, "-m", "jeagle.extract", "--config", RECIPE, *flags, "--out", str(folder / "two")]
    launch = ["bash", str(ROOT / "launch" / "gpu_node.sh"), "--processes", "2", "--", *command]
    one_device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | one_device | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = features.Store(str(stores["float32"])), features.Store(str(folder / "two"))
    two.check_complete()
    assert len({segment.data.split(".")[1] for segment in two.segments}) == 2
    for split in ("train", "held_out"):
        batch = one.batch(split, range(one.rows(split)))
        a, b = (store.stored(split, range(one.rows(split)), batch) for store in (one, two))
        np.testing.assert_allclose(a.aux.values, b.aux.values, atol=1e-4)
        np.testing.assert_allclose(a.teacher.values, b.teacher.values, atol=1e-4)
        np.testing.assert_array_equal(a.greedy_BT, b.greedy_BT)


def test_info_and_sample(folder, stores, capsys):
    assert storing.main(["info", str(stores["int8"])]) == 0
    said = capsys.readouterr().out
    assert "stored as int8" in said and "none missing" in said and "jeagle.extract" in said
    assert storing.main(["sample", str(stores["int8"]), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("train row") == 2 and "<|im_start|>assistant" in said


def test_a_disk_too_small_is_said_before_anything_is_computed(folder, monkeypatch):
    monkeypatch.setattr("jeagle.features.storage.Storage.free_bytes", lambda self: 50_000)
    with pytest.raises(UserError, match=r"needs .* GB for \d+ rows, the disk .* fits \d+ rows"):
        fill.extract(config_of(folder, name="extract"), str(folder / "none"))
