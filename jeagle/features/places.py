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

ASIDE = "aside"  # what is written before it gets its name
_SCHEMES = {"gs://": "gcs", "s3://": "s3"}
_ABSENT = b"\x02"  # the generation of a key that is not there, in tensorstore's encoding
_FULL = ("No space left", "os_error_code='28'", "Disk quota", "RESOURCE_EXHAUSTED")


class Full(UserError):
    """The place has no room for what was being written."""


class Place:
    """A folder of keys. AWS_ENDPOINT_URL and AWS_REGION are read for s3://, as other clients do.

    Attributes:
      url: as the user wrote it. path: the local folder, None for object storage.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        scheme = next((s for s in _SCHEMES if self.url.startswith(s)), None)
        if scheme is None and "://" in self.url:
            raise UserError(f"The store {self.url} is neither a local path nor gs://BUCKET/PATH nor s3://BUCKET/PATH.")
        self.path = None if scheme else Path(self.url).expanduser().absolute()
        self._spec = {"driver": "file", "path": f"{self.path}/"} if scheme is None else _remote(self.url, scheme)
        self._opened: Any = None

    def __str__(self) -> str:
        return self.url

    def kvstore(self, key: str = "") -> dict[str, Any]:
        """The tensorstore spec of a folder or a key in it."""
        return self._spec | {"path": self._spec["path"] + key}

    @property
    def _kv(self) -> Any:
        if self._opened is None:
            self._opened = ts.KvStore.open(self._spec).result()
        return self._opened

    def read(self, key: str) -> bytes | None:
        """A key's bytes; None where it is absent."""
        if self.path is not None:
            try:
                return (self.path / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        found = self._kv.read(key).result()
        return bytes(found.value) if found.state == "value" else None

    def write(self, key: str, data: bytes) -> None:
        """Writes a key whole, over an older one."""
        with full_disk_named(self):
            if self.path is None:
                self._kv.write(key, data).result()
                return
            with self._aside(key, data) as aside:
                os.replace(aside, self.path / key)

    def write_new(self, key: str, data: bytes) -> bool:
        """Writes a key whole unless it is there already; of several writers one gets True."""
        with full_disk_named(self):
            if self.path is None:
                return bool(self._kv.write(key, data, if_equal=_ABSENT).result().generation)
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

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted: keys by their last part, and folders."""
        if self.path is not None:
            try:
                found = {name for name in os.listdir(self.path / folder) if not name.startswith(".")}
            except (FileNotFoundError, NotADirectoryError):
                found = set()
            return sorted(found)
        prefix = f"{folder}/".encode()
        keys = self._kv.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + b"0")).result()
        return sorted({key[len(prefix) :].split(b"/")[0].decode() for key in keys})

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
        self._kv.write(key, None).result()
        prefix = f"{key}/".encode()
        self._kv.delete_range(ts.KvStore.KeyRange(prefix, prefix[:-1] + b"0")).result()

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
def full_disk_named(place: Place) -> Iterator[None]:
    """Turns every way in which a full disk shows itself into `Full`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None) in (28, 122) or any(sign in str(error) for sign in _FULL):
            free = (place.free_bytes() or 0) / 1e6
            raise Full(
                f"The disk of {place} is full, {free:,.3f} MB are free: make room, and the same command goes on."
            ) from error
        raise


def _remote(url: str, scheme: str) -> dict[str, Any]:
    bucket, _, path = url[len(scheme) :].partition("/")
    if not bucket or not path:
        raise UserError(f"The store {url} needs a bucket and a path: {scheme}BUCKET/PATH.")
    spec: dict[str, Any] = {"driver": _SCHEMES[scheme], "bucket": bucket, "path": f"{path}/"}
    if scheme == "s3://":
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            spec["aws_region"] = region
    return spec
