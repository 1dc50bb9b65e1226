"""Hidden states of the peers' files: the same samples in three formats of speculators, SpecForge's, what is refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jeagle.errors import UserError
from jeagle.exchange.peer_features import open_peer_features
from jeagle.exchange.torch_pickle import read_torch

SAMPLES = Path(__file__).parent / "samples" / "features"


def test_the_formats_of_speculators_agree():
    """The writers were run on the same rows."""
    found = {name: open_peer_features(SAMPLES / f"data_{name}") for name in ("v0", "v1", "current")}
    assert not any(f.normed for f in found.values())
    for i in range(2):
        first, second, third = (found[name].read(i) for name in ("v0", "v1", "current"))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)
        assert first.aux.shape == (len(first.tokens), 3, 32) and first.aux.dtype == ml_dtypes.bfloat16
        assert first.supervised.any() and not first.supervised.all()
        np.testing.assert_array_equal(third.tokens, first.tokens)
        np.testing.assert_array_equal(third.supervised, first.supervised)


def test_states_of_vllm_without_masks_count_everywhere(tmp_path):
    shutil.copy(SAMPLES / "data_current" / "hidden_states" / "hs_0.safetensors", tmp_path / "hs_0.safetensors")
    sample = open_peer_features(tmp_path).read(0)
    assert sample.supervised.all()
    raw = load_file(tmp_path / "hs_0.safetensors")
    np.testing.assert_array_equal(sample.last, raw["hidden_states"][:, -1])


STORAGES = {
    "bfloat16": "BFloat16Storage",
    "bool": "BoolStorage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "int64": "LongStorage",
}


def torch_file(tree: object) -> bytes:
    """A zip as torch.save writes it, of a tree in which ("tensor", array) stands for a tensor."""
    arrays: list[np.ndarray] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            return found.key if isinstance(found, Storage) else None

        def reducer_override(self, found):
            if isinstance(found, np.ndarray):
                return Call("torch._utils", "_rebuild_tensor_v2"), tensor_arguments(found)
            return NotImplemented

    class Storage:
        def __init__(self, array):
            arrays.append(array)
            kind = STORAGES[array.dtype.name]
            self.key = ("storage", Call("torch", kind), str(len(arrays) - 1), "cpu", array.size)

    def tensor_arguments(array):
        strides = tuple(s // array.itemsize for s in array.strides)
        return Storage(array), 0, array.shape, strides, False, None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(tree)
    for name in ("torch", "torch._utils"):  # a stand-in must not be found by others
        if getattr(sys.modules.get(name), "__spec__", "none") is None:
            del sys.modules[name]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", buffer.getvalue())
        for i, array in enumerate(arrays):
            archive.writestr(f"a/data/{i}", array.tobytes())
    return file.getvalue()


def Call(module: str, name: str):
    """A function that pickles as module.name, which need not exist."""
    import types

    stand_in = types.FunctionType((lambda *a: None).__code__, {}, name)
    stand_in.__module__, stand_in.__qualname__ = module, name
    parent = sys.modules.setdefault(module, types.ModuleType(module))
    if not hasattr(parent, name):
        setattr(parent, name, stand_in)
    return getattr(parent, name)


@pytest.fixture
def specforge(monkeypatch) -> dict[str, np.ndarray]:
    """A sample's dict as SpecForge saves it. What stands in for torch while it is pickled goes afterwards."""
    import sys

    for name in ("torch", "torch._utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    rng = np.random.default_rng(0)
    states = {"hidden_state": (1, 6, 4), "aux_hidden_state": (1, 6, 12)}
    tree = {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in states.items()}
    yield tree | {"input_ids": np.arange(6), "loss_mask": np.array([0, 0, 1, 1, 1, 0])}
    for name in ("torch", "torch._utils"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("suffix", [".ckpt", ".ckpt.gz"])
def test_specforge(tmp_path, specforge, suffix):
    path = tmp_path / "rows_0-2000" / f"data_0{suffix}"
    path.parent.mkdir()
    data = torch_file(specforge)
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    found = open_peer_features(tmp_path)
    sample = found.read(0)
    assert found.normed
    np.testing.assert_array_equal(sample.aux[:, 1], specforge["aux_hidden_state"][0, :, 4:8])
    np.testing.assert_array_equal(sample.last, specforge["hidden_state"][0])
    np.testing.assert_array_equal(sample.supervised, [0, 0, 1, 1, 1, 0])


def test_a_short_or_unfinite_file_is_refused(tmp_path, specforge):
    short = specforge | {"loss_mask": np.ones(5, np.int64)}
    broken = specforge | {"hidden_state": np.full((1, 6, 4), np.nan).astype(ml_dtypes.bfloat16)}
    for name, tree, said in (("a", short, "cut short"), ("b", broken, "not finite numbers")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data_0.ckpt").write_bytes(torch_file(tree))
        with pytest.raises(UserError, match=said):
            open_peer_features(tmp_path / name).read(0)


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"input_ids": Harm()}))
    with pytest.raises(UserError, match=r"mkdir to be called"):
        read_torch(tmp_path / "x.ckpt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("cut", [10, 2000, 4000])
def test_a_cut_file_is_refused(tmp_path, cut):
    (tmp_path / "data_0.pt").write_bytes((SAMPLES / "data_v1" / "data_0.pt").read_bytes()[:cut])
    with pytest.raises(UserError, match="not a complete file"):
        read_torch(tmp_path / "data_0.pt")


def test_other_tokens_than_the_dataset_has_are_refused(tmp_path):
    copy = shutil.copytree(SAMPLES / "data_current", tmp_path / "d")
    path = copy / "hidden_states" / "hs_0.safetensors"
    tree = load_file(path)
    tree["token_ids"][3] += 1
    save_file(tree, path)
    with pytest.raises(UserError, match="other tokens than row 0"):
        open_peer_features(copy).read(0)
