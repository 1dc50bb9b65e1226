"""Options that reach from training into checkpoints, exports and further runs, in one process."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jeagle import data
from jeagle import flags as configs
from jeagle.config import RunConfig
from jeagle.exchange import read_draft
from jeagle.export import ENGINES, export
from jeagle.run import assemble, dataset
from jeagle.runtime.checkpoints import load_named
from jeagle.runtime.mesh import make_mesh
from jeagle.train import train
from tests import tiny


def run(folder, **settings) -> RunConfig:
    flags = tiny.flags(folder, draft__ttt_steps=2, **settings)
    config = configs.parse_overrides(RunConfig(name="x"), flags, program="x", description="x")
    dataset.prepare(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "mesh_of", lambda config: make_mesh(devices=jax.devices()[:2]))
        train(config)
    return config


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> RunConfig:
    """A draft of another width, in two parts a step, with a moving average and a profile."""
    folder = tmp_path_factory.mktemp("options")
    return run(
        folder,
        name="first",
        draft__width=24,
        train__steps=6,
        train__accumulate=2,
        train__ema=0.9,
        train__learning_rate=0.01,
        profile=1,
    )


def test_the_average_is_what_is_measured_and_exported(first):
    _, tree = load_named(first.folder / "checkpoints", "last")
    _, spec, params = assemble.load_draft(first.folder, "last")
    (average,) = (array for name, array in tree.items() if name.startswith(".average['fc']"))
    (trained,) = (array for name, array in tree.items() if name.startswith(".draft['fc']"))
    np.testing.assert_array_equal(params["fc"], average)
    assert not np.array_equal(average, trained)
    assert (spec.width, spec.target_width) == (24, tiny.WIDTH)


def test_an_own_embedding_is_kept_and_exported(first):
    kept = np.load(first.folder / "embedding.npy")
    for engine, arguments in ENGINES.items():
        export(arguments(str(first.folder), dtype="float32"))  # reads back, and compares
        read = read_draft(first.folder / "exports" / engine)
        np.testing.assert_array_equal(read.embed_VW, kept)


def test_a_profile_is_written(first):
    assert list((first.folder / "profile").rglob("*.xplane.pb"))


def test_adapters_beside_an_older_draft(first):
    """The next run has its vocabulary and embedding; kernels move by low rank, the rest stays."""
    folder = first.folder.parent.parent
    second = run(
        folder, name="second", draft__start=first.folder, draft__lora=2, train__steps=3, train__learning_rate=0.01
    )
    _, spec, before = assemble.load_draft(first.folder, "last")
    _, same_spec, after = assemble.load_draft(second.folder, "last")
    assert same_spec == spec and sorted(before) == sorted(after)
    for name, array in after.items():
        change = array - before[name]
        adapted = array.ndim == 2 and name != "lm_head"
        assert np.any(change) == adapted, name
        assert not adapted or np.linalg.matrix_rank(change, tol=1e-5) <= 2, name
    np.testing.assert_array_equal(*(data.load_tables(r.folder / "tables") for r in (first, second)))
    np.testing.assert_array_equal(*(np.load(r.folder / "embedding.npy") for r in (first, second)))
