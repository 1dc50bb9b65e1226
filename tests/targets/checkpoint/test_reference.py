"""Forms of a target's reference, local folders, and fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jeagle.errors import UserError
from jeagle.runtime.host import cache_folder
from jeagle.targets.checkpoint import download
from jeagle.targets.checkpoint.reference import resolve

CONTENT = b"GGUF not really" * 1000


@pytest.mark.parametrize("reference", ["", "no such thing", "./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf"])
def test_an_invalid_reference_is_refused_with_the_valid_forms(reference: str):
    with pytest.raises(UserError, match=r"local folder.*hub id.*pypi:NAME==VERSION"):
        resolve(reference)


@pytest.mark.parametrize("reference", ["pypi:", "pypi:name", "pypi:name>=1", "pypi:../x==1"])
def test_bad_pypi_references(reference: str):
    with pytest.raises(UserError, match="pypi:NAME==VERSION"):
        resolve(reference)


def test_local_folders(tmp_path: Path):
    (tmp_path / "one.gguf").write_bytes(CONTENT)
    for reference in (str(tmp_path), str(tmp_path / "one.gguf")):
        files = resolve(reference)
        assert (files.reference, files.path, files.format) == (reference, tmp_path / "one.gguf", "gguf")
    (tmp_path / "two.gguf").write_bytes(CONTENT)
    with pytest.raises(UserError, match="several GGUF files"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no weights"),
        (["pytorch_model.bin", "config.json"], r"pytorch_model\.bin.*save_pretrained"),
        (["model.safetensors"], "no config.json"),
        (["m-00001-of-00002.gguf"], r"m-00002-of-00002\.gguf is not beside it"),
    ],
)
def test_folders_that_cannot_be_used(names: list[str], message: str, tmp_path: Path):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path))


def test_a_file_that_is_not_gguf(tmp_path: Path):
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not a \.gguf"):
        resolve(str(tmp_path / "model.pt"))


def test_fingerprints_follow_the_weights(tmp_path: Path):
    weights = np.zeros((300, 300), np.float32)
    (tmp_path / "config.json").write_text("{}")
    seen = set()
    for change in (None, (0, 0), (299, 299), slice(0, None)):  # the last is what fine-tuning does: all change
        if change is not None:
            weights[change] += 1
        save_file({"w": weights}, tmp_path / "model.safetensors")
        seen.add(resolve(str(tmp_path)).fingerprint)
        assert resolve(str(tmp_path)).fingerprint in seen
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    seen.add(resolve(str(tmp_path)).fingerprint)
    assert len(seen) == 5


def test_gguf_fingerprint_is_recorded_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)
    first = resolve(str(path)).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(download.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert resolve(str(path)).fingerprint == first
    path.write_bytes(CONTENT + b"x")
    assert resolve(str(path)).fingerprint == hashlib.sha256(CONTENT + b"x").hexdigest()[:16]
    path.with_name("m.gguf.sha256.json").write_text("not json")
    assert resolve(str(path)).fingerprint == hashlib.sha256(CONTENT + b"x").hexdigest()[:16]


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JEAGLE_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("JEAGLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "jeagle"
