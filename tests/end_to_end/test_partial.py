"""Training from a store that lacks rows, on eight devices and in parts: the losses of one that computes all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jeagle import data, features
from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.extraction import fill
from jeagle.runtime.checkpoints import load_named
from jeagle.train import train
from tests import tiny

RECIPE = str(Path(__file__).parents[2] / "configs" / "llama3_8b.py")
STEPS, ROWS = 4, 16
FIGURES = ("loss", "gradient_norm", "accuracy_0", "acceptance_1")


def config_of(folder: Path, **more):
    settings = {"train__steps": STEPS, "train__save_every": 2, "draft__ttt_steps": 2, "train__held_out_rows": 100}
    settings |= {
        "train__batch_rows": ROWS,
        "train__accumulate": 2,
        "data__row_length": 32,
        "data__held_out": 0.2,
    } | more
    return configs.from_command_line(["--config", RECIPE, *tiny.flags(folder, **settings)], program="", description="")


def run(folder: Path, **more) -> tuple[list[dict], list[dict]]:
    """Trains, and returns what was logged of every step, and of the held-out rows at each checkpoint."""
    config = config_of(folder, **more)
    train(config)
    files = config.folder / "metrics.jsonl", config.folder / "held_out" / "metrics.jsonl"
    steps, held_out = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    return steps, held_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("partial")


@pytest.fixture(scope="module")
def partial(folder) -> Path:
    """An exact store without the rows of the second batch, 16 of 48, and without the last rows held out."""
    settings = {"store__aux_dtype": "float32", "store__last_dtype": "float32", "store__segment_mb": 1}
    with pytest.MonkeyPatch.context() as patch:  # segments of one row: of a batch of one row, on one device
        patch.setattr(jax, "devices", lambda real=jax.devices: real()[:1])
        config = config_of(folder, name="extract", train__batch_rows=1, train__accumulate=1, **settings)
        config = dataclasses.replace(config, store=dataclasses.replace(config.store, segment_mb=0))
        fill.extract(config, str(folder / "store"))
    stream = data.RowStream(config.folder / "data" / "train", ROWS, config.train.seed)
    missing = [f"train-{row:06d}" for row in stream.row_numbers(1)] + [f"held_out-{row:06d}" for row in range(9, 12)]
    assert len(features.prune_store(features.Storage(folder / "store"), missing)) == 2 * len(missing)
    return folder / "store"


@pytest.fixture(scope="module")
def online(folder) -> tuple[list[dict], list[dict]]:
    return run(folder, name="online")


@pytest.fixture(scope="module")
def mixed(folder, partial) -> tuple[list[dict], list[dict]]:
    return run(folder, name="mixed", features=partial, features_rest="online")


def check_same(found: tuple[list[dict], list[dict]], wanted: tuple[list[dict], list[dict]]) -> None:
    for name in FIGURES:
        np.testing.assert_allclose([r[name] for r in found[0]], [r[name] for r in wanted[0]], rtol=2e-6)
    for name in wanted[1][0]:
        np.testing.assert_allclose([r[name] for r in found[1]], [r[name] for r in wanted[1]], rtol=2e-6)


def test_a_store_without_a_third_gives_the_online_losses(online, mixed, partial):
    """Of the first epoch's three batches the second is computed, and so is a batch of the next epoch."""
    check_same(mixed, online)
    assert [r["read_share"] for r in mixed[0]] == [1.0, 0.0, 1.0, 0.0]
    store = features.Store(str(partial))
    assert [(len(store.present(s)), store.rows(s)) for s in features.SPLITS] == [(32, 48), (9, 12)]
    assert "read_share" not in online[0][0]


def test_it_is_refused_unless_asked_for(folder, partial):
    with pytest.raises(UserError, match="is not finished: .* rows are missing"):
        train(config_of(folder, name="refused", features=partial))


def test_a_resumed_run_is_the_one_that_was_not_stopped(folder, partial, mixed):
    config = config_of(folder, name="resumed", features=partial, features_rest="online")
    begun = folder / "runs" / "mixed"
    shutil.copytree(begun, config.folder)
    tree = json.loads((config.folder / "config.json").read_text()) | {"name": "resumed"}
    (config.folder / "config.json").write_text(json.dumps(tree))
    shutil.rmtree(config.folder / "checkpoints" / "4")
    train(config)
    before, after = (load_named(path / "checkpoints", 4)[1] for path in (begun, config.folder))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)


WRONG = {
    "another target": ({"target__dtype": "bfloat16"}, r"does not fit this run: target.dtype differs"),
    "another template": ({"data__template": "llama3"}, r"does not fit this run: data.template differs"),
    "other data": ({"data__max_conversations": 20}, r"does not fit this run: data.max_conversations differs"),
    "two stores": ({"features": "{0},{0}"}, "takes the rows of one store"),
    "no store": ({"features": "auto"}, "names none"),
}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(folder, partial, changed, said):
    settings = {"features": str(partial), "features_rest": "online"} | changed
    settings["features"] = settings["features"].format(partial)
    with pytest.raises(UserError, match=said):
        train(config_of(folder, name="refused", **settings))
