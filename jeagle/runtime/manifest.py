"""Files and folders that are either finished or absent, and manifests that say what they were made from.

A folder counts as finished when it holds manifest.json, which is written last. A process that is killed leaves at
most a sibling whose name starts with a dot and ends in .partial; the next writer of the same path on the same machine
removes it. One path is written by one thread of a process at a time.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.runtime.host import is_alive
from jeagle.runtime.outputs import Output, check_replaceable, json_file, parents_made

MANIFEST = "manifest.json"


def atomic_write(path: str | Path, data: bytes | str, kind: Output) -> None:
    """Writes `path` whole or not at all, making its parent folders; text is written as UTF-8.

    UserError where a file lies there that is not of this kind: it is a user's.
    """
    with _replacing(path, kind) as (path, aside):
        with open(aside, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: Output) -> Iterator[Path]:
    """Yields an empty sibling folder that replaces `path` when the block succeeds, and vanishes when it does not.

    An older `path` stays as it is until then. UserError, before the block and after it, where it is neither empty nor
    of this kind: it is a user's.
    """
    with _replacing(path, kind) as (path, aside):
        aside.mkdir()
        yield aside
        # Before the rename, so that a folder that survives a power cut under its final name is whole.
        for part in aside.rglob("*"):
            if part.is_file():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
        _replace_folder(aside, path, kind)


def canonical(tree: Any) -> str:
    """JSON of `tree` that does not depend on the order of its keys: sorted, without spaces, plain UTF-8."""
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def fingerprint(tree: Any) -> str:
    """First 16 hex digits of the sha256 of `tree`'s canonical JSON."""
    return hashlib.sha256(canonical(tree).encode("utf-8")).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """First 16 hex digits of the sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def differences(old: dict, new: dict) -> list[str]:
    """Dotted names of the fields whose values differ or that only one of the two has, sorted.

    Trees are compared as JSON would hold them, so a tuple equals a list.
    """
    old, new = flat(json.loads(canonical(old))), flat(json.loads(canonical(new)))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def read_manifest(folder: str | Path) -> dict | None:
    """The manifest of a finished folder; None where there is none or it cannot be read, so the folder is unfinished."""
    try:
        tree = json.loads((Path(folder) / MANIFEST).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return tree if isinstance(tree, dict) else None


def finished_manifest(folder: str | Path) -> dict:
    """The manifest of a folder that must be finished. UserError where it is not."""
    tree = read_manifest(folder)
    if tree is None:
        raise UserError(f"{folder} is not prepared: run python -m jeagle.prepare first.")
    return tree


def write_manifest(folder: str | Path, tree: dict) -> None:
    """Writes folder/manifest.json: call it last, since it is what makes the folder count as finished."""
    text = json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    atomic_write(Path(folder) / MANIFEST, text, json_file("manifest"))  # the folder's kind has been checked


def checksums(folder: Path) -> dict[str, str]:
    """The fingerprint of each file in a folder by its path there, for the manifest that is to be written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_fingerprint(path) for path in files}


def check_intact(folder: Path, *names: str) -> None:
    """UserError where files are not those whose `checksums` the folder's manifest has; without one nothing is known.

    Args:
      names: of the files that are read; all of them where none is given.
    """
    saved = (read_manifest(folder) or {}).get("checksums", {})
    for name in names or saved:
        if name in saved and (not (folder / name).is_file() or file_fingerprint(folder / name) != saved[name]):
            raise UserError(
                f"{folder / name} is damaged or was edited, its checksum is not that of the {MANIFEST} in {folder}: "
                "restore it, or move the folder away, so that the next command makes it anew."
            )


def set_aside(path: Path, folder: Path, name: str) -> Path:
    """Moves what is damaged to FOLDER/damaged/NAME.0, or the first number that is free, and returns where it is now."""
    place = next(place for n in itertools.count() if not (place := folder / "damaged" / f"{name}.{n}").exists())
    place.parent.mkdir(exist_ok=True)
    return path.rename(place)


def flat(tree: dict, prefix: str = "") -> dict[str, str]:
    """Canonical JSON of each leaf by its dotted name: unlike Python, JSON tells true from 1."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = canonical(value)
    return leaves


def _start(path: Path) -> str:
    """How the names of siblings begin that writers on this machine use."""
    machine = "".join(c if c.isalnum() else "-" for c in socket.gethostname()) or "here"
    return f".{path.name}.{machine}."


@contextlib.contextmanager
def _replacing(path: str | Path, kind: Output) -> Iterator[tuple[Path, Path]]:
    """Yields `path` and a sibling that is to replace it, which goes where the block fails.

    Also removes what killed writers of `path` left behind; a living process, or another machine, keeps its own.
    """
    path = Path(path)
    path = path if path.name else path.resolve()  # "." has no name
    check_replaceable(path, kind)
    with parents_made(path):
        start = _start(path)
        for left in path.parent.glob(f"{glob.escape(start)}*.partial"):
            process = left.name[len(start) :].split(".")[0]
            if process.isdigit() and (int(process) == os.getpid() or not is_alive(int(process))):
                _remove(left)
        aside = path.with_name(f"{start}{os.getpid()}.partial")
        try:
            yield path, aside
        except BaseException:
            _remove(aside)
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(aside: Path, path: Path, kind: Output) -> None:
    """A full folder cannot be renamed over: the old one steps aside first and goes last.

    Hosts that share a disk may do this at the same time: whoever finds the place taken again tries again.
    """
    old = path.with_name(f"{_start(path)}{os.getpid()}.old.partial")
    for attempt in range(10):
        check_replaceable(path, kind)
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        try:
            os.rename(aside, path)
            break
        except OSError:
            if attempt == 9 or not aside.exists():
                raise
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)
