"""Weights of safetensors folders are read entirely and by slices, and damaged folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jeagle.errors import UserError
from jeagle.targets import open_weights, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, one array in bfloat16."""
    rng = np.random.default_rng(0)
    whole = {"a": rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16), "b": np.arange(12, dtype=np.float16)}
    for name in whole:
        save_file({name: whole[name]}, tmp_path / f"model-{name}.safetensors")
    index = {"weight_map": {"a": "model-a.safetensors", "b": "model-b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "hidden_size": 4}')
    return tmp_path


def test_safetensors_shards_and_slices(folder: Path):
    save_file({"junk": np.ones(2)}, folder / "consolidated.safetensors")
    source = open_weights(resolve(str(folder)))
    assert source.names() == ["a", "b"]
    assert (source.shape("a"), source.shape("b")) == ((6, 4), (12,))
    whole = source.read("a")
    assert whole.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read("a", (slice(1, 5), slice(None))), whole[1:5])
    np.testing.assert_array_equal(source.read("a", (slice(None), slice(2, 4))), whole[:, 2:4])
    np.testing.assert_array_equal(source.read("b", (slice(3, 4),)), [3])


def test_generation_config_adds_its_end_tokens(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert open_weights(resolve(str(folder))).config["eos_token_id"] == [2, 5]


def test_broken_safetensors_are_named(folder: Path):
    files = resolve(str(folder))
    with pytest.raises(UserError, match="no tensor c"):
        open_weights(files).shape("c")
    shard = folder / "model-b.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"model-b\.safetensors cannot be read"):
        open_weights(files)
    save_file({"other": np.ones(2)}, shard)
    with pytest.raises(UserError, match=r"tensor b .*model-b\.safetensors"):
        open_weights(files)
    shard.unlink()
    with pytest.raises(UserError, match=r"model-b\.safetensors is missing"):
        open_weights(files)


def test_safetensors_folders_that_are_refused(folder: Path):
    files = resolve(str(folder))
    index = (folder / "model.safetensors.index.json").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"index\.json"):
        open_weights(files)
    index.rename(folder / "model.safetensors.index.json")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(UserError, match="quantised .awq."):
        open_weights(files)
    (folder / "config.json").write_text('{"half')
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        open_weights(files)
