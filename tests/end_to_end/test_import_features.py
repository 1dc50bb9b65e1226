"""Others' hidden states become a store that says what the target says; other layers and other targets are refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jeagle import features
from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture
from jeagle.extraction.peer_import import import_peer_features
from jeagle.interfaces import Batch
from jeagle.run import assemble
from jeagle.training import teacher
from tests import tiny

RECIPE = str(Path(__file__).parents[2] / "configs" / "llama3_8b.py")
AUX_LAYERS = (2, 4, 5)


def config_of(folder: Path, **more):
    flags = tiny.flags(folder, name="imported", store__aux_dtype="bfloat16", store__last_dtype="bfloat16", **more)
    return configs.from_command_line(["--config", RECIPE, *flags], program="", description="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny target, and states of it as vLLM writes them: the last slot is from before the final norm."""
    folder = tmp_path_factory.mktemp("import")
    settings = config_of(folder)
    mesh = assemble.mesh_of(settings)
    loaded = assemble.load_target(settings, mesh)
    capture = Capture(loaded.target, tuple(range(tiny.LAYERS + 1)), mesh, width=64)
    rng, length = np.random.default_rng(0), 40
    tokens = rng.integers(3, 200, (16, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (16, 1))
    found = capture(Batch(tokens, np.ones_like(tokens), positions, np.ones(tokens.shape, bool)))
    (folder / "vllm").mkdir()
    for i, states in enumerate(found.aux.values):
        kept = np.ascontiguousarray(states[:, [*AUX_LAYERS, tiny.LAYERS]].astype(ml_dtypes.bfloat16))
        save_file(
            {"hidden_states": kept, "token_ids": tokens[i].astype(np.int64)}, folder / "vllm" / f"hs_{i}.safetensors"
        )
    np.savez(folder / "expected.npz", last=found.teacher.values, greedy=found.greedy_BT)
    return folder


def test_states_of_vllm_become_a_store(folder):
    out = folder / "store"
    import_peer_features(config_of(folder), folder / "vllm", str(out))
    store = features.Store(str(out))
    store.check_complete()
    assert store.rows("train") == 14 and store.rows("held_out") == 2
    batch = store.batch("train", range(14))
    got = features.decode_features(store.stored("train", range(14), batch))
    expected = np.load(folder / "expected.npz")
    np.testing.assert_allclose(np.asarray(got.teacher)[:, :40], expected["last"][:14], rtol=0.05, atol=0.05)
    assert (np.asarray(got.greedy_BT)[:, :40] == expected["greedy"][:14]).mean() > 0.97
    first = load_file(folder / "vllm" / "hs_0.safetensors")["hidden_states"][:, :-1]
    np.testing.assert_array_equal(np.asarray(got.aux_BTAH)[0, :40], first.astype(np.float32))
    # A run's rows are those of the files, whatever conversations its settings name; the remedy fits such a store.
    assert teacher.open_stores(config_of(folder, features=out, data__long="split")) is not None
    with pytest.raises(UserError, match=r"row_length: 64 in the store, 32 here\)\. Import the files anew"):
        teacher.open_stores(config_of(folder, features=out, data__row_length=32))


def test_what_a_store_keeps_of_others_states_is_the_users_to_say(folder):
    """The likeliest tokens are those of the states, by the target's own head."""
    out = folder / "likeliest"
    import_peer_features(config_of(folder, store__teacher="top_k", store__top_k=5), folder / "vllm", str(out))
    store = features.Store(str(out))
    batch = store.batch("train", range(14))
    got, expected = store.stored("train", range(14), batch), np.load(folder / "expected.npz")
    assert store.format == features.StoreFormat("bfloat16", top_k=5)
    np.testing.assert_array_equal(got.teacher.ids_BTP[..., 0], got.greedy_BT)
    assert (got.greedy_BT[:, :40] == expected["greedy"][:14]).mean() > 0.97


def test_states_of_other_layers_or_another_target_are_refused(folder, tmp_path):
    for i in range(2):
        tree = load_file(folder / "vllm" / f"hs_{i}.safetensors")
        deeper = np.ascontiguousarray(tree["hidden_states"][:, [0, 1, 3, 3]])
        (tmp_path / "deeper").mkdir(exist_ok=True)
        save_file(tree | {"hidden_states": deeper}, tmp_path / "deeper" / f"hs_{i}.safetensors")
        (tmp_path / "other").mkdir(exist_ok=True)
        other = np.ascontiguousarray(tree["hidden_states"][::-1])
        save_file(tree | {"hidden_states": other}, tmp_path / "other" / f"hs_{i}.safetensors")
    with pytest.raises(UserError, match=r"after 2, 4, 8 layers, .* asks for 2, 4, 5: give --target.aux-layers 2 4 8"):
        import_peer_features(config_of(folder), tmp_path / "deeper", str(tmp_path / "s"))
    with pytest.raises(UserError, match="hidden states of no layer of this target"):
        import_peer_features(config_of(folder), tmp_path / "other", str(tmp_path / "s"))
