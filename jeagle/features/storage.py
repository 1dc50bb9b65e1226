"""Where a store lies: a local folder, gs:// or s3://, read and written by whole keys.

A key is either wholly there or absent, on every kind of place: that is all that the store's safety rests on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from jeagle.errors import UserError
from jeagle.features.remote import DRIVERS, FIRST, retrying, spec_of, unreachable

ASIDE = "aside"  # what is written before it gets its name
_FULL = ("No space left", "os_error_code='28'", "Disk quota", "RESOURCE_EXHAUSTED")


class Full(UserError):
    """The place has no room for what was being written."""


class Place:
    """A folder of keys.

    Attributes:
      url: as the user wrote it. path: the local folder, None for object storage.

    Every method raises UserError where object storage refuses, or gives no answer.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        scheme = next((s for s in DRIVERS if self.url.startswith(s)), None)
        if scheme is None and "://" in self.url:
            raise UserError(f"The store {self.url} is neither a local path nor gs://BUCKET/PATH nor s3://BUCKET/PATH.")
        self.path = None if scheme else Path(self.url).expanduser().absolute()
        self._spec = {"driver": "file", "path": f"{self.path}/"} if scheme is None else spec_of(self.url)
        self._opened: Any = None

    def __str__(self) -> str:
        return self.url

    def kvstore(self, key: str = "") -> dict[str, Any]:
        """The tensorstore spec of a folder or a key in it."""
        return self._spec | {"path": self._spec["path"] + key}

    @property
    def _kv(self) -> Any:
        if self._opened is None:
            ts.KvStore.open(retrying(self._spec, FIRST)).result().read("store.json").result()
            self._opened = ts.KvStore.open(self._spec).result()
        return self._opened

    def read(self, key: str) -> bytes | None:
        """A key's bytes; None where it is absent."""
        if self.path is not None:
            try:
                return (self.path / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        with faults_named(self):
            found = self._kv.read(key).result()
        return bytes(found.value) if found.state == "value" else None

    def write(self, key: str, data: bytes) -> None:
        """Writes a key whole, over an older one."""
        with faults_named(self):
            if self.path is None:
                self._kv.write(key, data).result()
                return
            with self._aside(key, data) as aside:
                os.replace(aside, self.path / key)

    def write_new(self, key: str, data: bytes) -> bool:
        """Writes a key whole unless it is there already; of several writers, of unlike bytes, one gets True."""
        with faults_named(self):
            if self.path is None:
                # Asked first: a server that ignores the condition still keeps what has long been there. And asked last:
                # where the answer to a first try was lost, the second one finds the first one's bytes in its way.
                found = self._kv.read(key).result()
                if found.state == "value":
                    return False
                accepted = self._kv.write(key, data, if_equal=found.stamp.generation).result().generation
                return bool(accepted) or self.read(key) == data
            if (self.path / key).exists():
                return False
            try:
                with self._aside(key, data) as aside:
                    os.link(aside, self.path / key)  # unlike a rename, this fails where the name is taken
                return True
            except FileExistsError:
                return False

    @contextlib.contextmanager
    def _aside(self, key: str, data: bytes) -> Iterator[Path]:
        """A file on disk with these bytes, under a name that nobody else has, gone afterwards."""
        assert self.path is not None
        folder = self.path / ASIDE
        for needed in (folder, (self.path / key).parent):
            needed.mkdir(parents=True, exist_ok=True)
        path = folder / f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what killed processes of this machine had not finished writing."""
        for path in (self.path / ASIDE).glob("*~*~*") if self.path is not None else ():
            host, process, _ = path.name.rsplit("~", 2)
            if host == socket.gethostname() and started(int(process)) is None:
                path.unlink(missing_ok=True)

    def names(self, folder: str, start: str = "") -> list[str]:
        """What lies in a folder, sorted: keys by their last part, and folders; only names that begin with `start`."""
        if self.path is not None:
            try:
                found = {
                    name
                    for name in os.listdir(self.path / folder)
                    if not name.startswith(".") and name.startswith(start)
                }
            except (FileNotFoundError, NotADirectoryError):
                found = set()
            return sorted(found)
        with faults_named(self):
            keys = self._kv.list(_below(f"{folder}/{start}")).result()
        return sorted({key[len(f"{folder}/".encode()) :].split(b"/")[0].decode() for key in keys})

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a local folder, by its name there; empty for object storage."""
        if self.path is None:
            return {}
        root = self.path / folder
        return {str(p.relative_to(root)): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}

    def delete(self, key: str) -> None:
        """Removes a key or a whole folder; nothing where there is none."""
        if self.path is not None:
            path = self.path / key
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        with faults_named(self):
            self._kv.write(key, None).result()
            self._kv.delete_range(_below(f"{key}/")).result()

    def free_bytes(self) -> int | None:
        """Room left on the disk that holds the folder, made or not; None for object storage."""
        if self.path is None:
            return None
        there = next(p for p in (self.path, *self.path.parents) if p.exists())
        return shutil.disk_usage(there).free


def started(process: int) -> str | None:
    """What tells a process from a later one of the same number; None where there is none."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "alive"
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def faults_named(place: Place) -> Iterator[None]:
    """Turns every way in which a full disk shows itself into `Full`, and what object storage refuses into UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None) in (28, 122) or any(sign in str(error) for sign in _FULL):
            free = (place.free_bytes() or 0) / 1e6
            raise Full(
                f"The disk of {place} is full, {free:,.3f} MB are free: make room, and the same command goes on."
            ) from error
        told = unreachable(str(place), error) if place.path is None else None
        if told:
            raise told from error
        raise


def _below(prefix: str) -> Any:
    """The keys that begin with a prefix."""
    start = prefix.encode()
    return ts.KvStore.KeyRange(start, start[:-1] + bytes([start[-1] + 1]))
