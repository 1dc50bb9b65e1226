"""Where a store lies: a local folder, gs:// or s3://, read and written by whole keys through tensorstore.

A key is either there with all its bytes or absent, and of several writers of a new key exactly one succeeds: the safety
of a store rests on nothing else. In a folder tensorstore writes a key beside its place, flushes it to the disk and
renames it, under a lock that the operating system releases when a process dies.

Arrays are zarr3, one shard each, with inner chunks whose crc32c is checked whenever they are read. Of tensorstore's
drivers only zarr3 stores an array in one file, reads a few positions of it, and notices a flipped byte; docs/offline.md
has the measurements.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from jeagle.errors import UserError
from jeagle.runtime import disk

DRIVERS = {"gs://": "gcs", "s3://": "s3"}
# Before the first answer a wrong address is likelier than a pause; afterwards a run outlives three minutes of silence.
FIRST_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}
LATER_RETRIES = {"max_retries": 10, "initial_delay": "1s", "max_delay": "32s"}
_CREDENTIALS = {
    "gs://": "GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud",
    "s3://": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}
_SIGNS_OF_NETWORK = (
    "http_response_code",
    "retry attempts failed",
    "CURL error",
    "credentials",
    "Endpoint ",
    "bucket name",
)
_SIGNS_OF_REFUSAL = ("'401'", "'403'", "PERMISSION_DENIED", "UNAUTHENTICATED")
_CHUNK_BYTES = 2**19  # the largest inner chunk, which is read at a time
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


class StorageFull(UserError):
    """The disk has no room for what was being written."""


class StorageUnreachable(UserError):
    """Object storage gave no answer, or refused to give one: nothing is known of its content."""


class Storage:
    """A folder of keys.

    Attributes:
      url: as the user wrote it.
      path: the local folder; None for object storage.

    Every method raises UserError where object storage refuses or gives no answer, and where the disk is full.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        scheme = next((s for s in DRIVERS if self.url.startswith(s)), None)
        if scheme is None and "://" in self.url:
            raise UserError(
                f"The store {self.url} must be a local path, gs://BUCKET/PATH or s3://BUCKET/PATH: give one of these."
            )
        self.path = None if scheme else Path(self.url).expanduser().resolve()
        self._spec = _bucket_spec(self.url, scheme) if scheme else {"driver": "file", "path": f"{self.path}/"}
        self._opened: Any = None

    def __str__(self) -> str:
        return self.url

    def kvstore(self, key: str = "") -> dict[str, Any]:
        """tensorstore's spec of a folder or a key in it."""
        return self._spec | {"path": self._spec["path"] + key}

    @property
    def _kv(self) -> Any:
        if self._opened is None:
            if self.path is None:
                hasty = self._spec | {f"{self._spec['driver']}_request_retries": FIRST_RETRIES}
                ts.KvStore.open(hasty).result().read("store.json").result()
            self._opened = ts.KvStore.open(self._spec).result()
        return self._opened

    def read(self, key: str) -> bytes | None:
        """A key's bytes; None where it is absent."""
        with named_faults(self):
            found = self._kv.read(key).result()
        return bytes(found.value) if found.state == "value" else None

    def write(self, key: str, data: bytes) -> None:
        """Writes a key with all its bytes, over an older one."""
        with named_faults(self):
            self._kv.write(key, data).result()

    def write_new(self, key: str, data: bytes) -> bool:
        """Writes a key unless it is there already; of several writers of different bytes exactly one gets True."""
        with named_faults(self):
            # The key is read before the write, because a server that ignores the condition must still not replace what
            # is there. It is read again afterwards, because a retry whose first answer was lost meets its own bytes.
            found = self._kv.read(key).result()
            if found.state == "value":
                return False
            accepted = self._kv.write(key, data, if_equal=found.stamp.generation).result().generation
            return bool(accepted) or self.read(key) == data

    def names(self, folder: str, start: str = "") -> list[str]:
        """The names of the keys and folders in a folder that begin with `start`, sorted."""
        with named_faults(self):
            keys = self._kv.list(_prefix_range(f"{folder}/{start}")).result()
        return sorted({key[len(f"{folder}/".encode()) :].split(b"/")[0].decode() for key in keys})

    def delete(self, key: str) -> None:
        """Removes a key or a folder with all its keys; it does nothing where there is none."""
        if self.path is not None and (self.path / key).is_dir():
            shutil.rmtree(self.path / key, ignore_errors=True)  # with the locks of processes that were killed
            return
        with named_faults(self):
            self._kv.write(key, None).result()
            self._kv.delete_range(_prefix_range(f"{key}/")).result()

    def free_bytes(self) -> int | None:
        """Free bytes on the disk of the folder, whether or not it exists yet; None for object storage."""
        if self.path is None:
            return None
        return disk.free_bytes(self.path)


@contextlib.contextmanager
def named_faults(storage: Storage) -> Iterator[None]:
    """Turns the errors of a full disk into StorageFull, and those of object storage into StorageUnreachable."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if disk.is_full(error):
            free = (storage.free_bytes() or 0) / 1e6
            raise StorageFull(
                f"The disk of {storage} is full, {free:,.3f} MB are free: make room, and start the same command again; "
                "it continues."
            ) from error
        if fault := unreachable(storage, error):
            raise fault from error
        raise


def unreachable(storage: Storage, error: Exception) -> StorageUnreachable | None:
    """A plain sentence for an error that object storage, or the network, gave; None for any other error."""
    text, url = str(error), storage.url
    if storage.path is not None or not any(sign in text for sign in _SIGNS_OF_NETWORK):
        return None
    code = re.search(r"<Code>(\w+)</Code>|: (\w+): ", text)
    refusal = (
        f"access is refused ({code.group(1) or code.group(2) if code else 'no reason given'}). Check the credentials"
    )
    says = {
        "NoSuchBucket": "there is no such bucket. Make it, or give another one.",
        "bucket name": f"{url.split('/')[2]} is not a valid name of a bucket.",
        "credentials": f"no credentials were found. Set {_CREDENTIALS[url[:5]]}.",
    } | dict.fromkeys(_SIGNS_OF_REFUSAL, f"{refusal} and their permissions in this bucket.")
    if sign := next((sign for sign in says if sign in text), None):
        return StorageUnreachable(f"{url} cannot be used: {says[sign]}")
    reason = re.sub(r" \[.*", "", text.split("failed: ")[-1]).splitlines()[0][:200]
    endpoint = ", and AWS_ENDPOINT_URL where it is set" if url.startswith("s3://") else ""
    return StorageUnreachable(f"{url} cannot be reached ({reason}). Check the network{endpoint}.")


def _bucket_spec(url: str, scheme: str) -> dict[str, Any]:
    """tensorstore's spec of gs://BUCKET/PATH or s3://BUCKET/PATH.

    For s3:// AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION, and the credentials are read as other clients read
    them.
    """
    bucket, _, path = url[len(scheme) :].partition("/")
    if not bucket or not path:
        raise UserError(f"The store {url} needs a bucket and a path: {scheme}BUCKET/PATH.")
    driver = DRIVERS[scheme]
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/"}
    spec[f"{driver}_request_retries"] = LATER_RETRIES
    if scheme == "s3://":
        # tensorstore assumes that only Amazon knows conditional writes. Without them two writers could both succeed.
        spec["use_conditional_write"] = True
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            spec["aws_region"] = region
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # otherwise tensorstore tries files, containers and instance metadata
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def _prefix_range(prefix: str) -> Any:
    """The keys that begin with a prefix."""
    start = prefix.encode()
    return ts.KvStore.KeyRange(start, start[:-1] + bytes([start[-1] + 1]))


def write_array(storage: Storage, key: str, array: Shaped[np.ndarray, "N ..."], chunk: int) -> dict[str, Any]:
    """Writes an array [N, ...] at `key`; returns its description for the segment's manifest.

    Args:
      chunk: the most entries of an inner chunk.

    Raises:
      StorageFull: the disk is full.
    """
    array = np.ascontiguousarray(array)
    spec = _spec(storage, key, array.shape, array.dtype, chunk)
    with named_faults(storage):
        new = ts.open(spec | {"store_data_equal_to_fill_value": True}, create=True, open=False).result()
        new.write(array).result()
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "chunk": spec["metadata"]["codecs"][0]["configuration"]["chunk_shape"][0],
        "crc32": checksum(array),
        "metadata_sha256": metadata_sha256(storage, key) or "",
    }


def checksum(array: Shaped[np.ndarray, "..."]) -> int:
    """The crc32 of an array's bytes."""
    flat: Any = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return zlib.crc32(flat)


def open_array(storage: Storage, key: str, described: dict[str, Any]) -> Any:
    """The tensorstore array at `key`. Nothing is read for it: the manifest describes all of it."""
    spec = _spec(storage, key, described["shape"], np.dtype(described["dtype"]), described["chunk"])
    reading = {"fill_missing_data_reads": False, "recheck_cached_data": False}
    return ts.open(spec | reading, open=True, assume_metadata=True).result()


def read_into(out: Shaped[np.ndarray, "N ..."], array: Any, start: int) -> Any:
    """Begins to read N entries from `start` on into `out`; returns a future that is done when the bytes are there."""
    return ts.array(out).write(array[start : start + len(out)][ts.d[0].translate_to[0]])


def damage(storage: Storage, segment: str, array: str, error: Exception) -> UserError:
    """A plain sentence for bytes that differ from those that were written, or for storage that does not give them."""
    if fault := unreachable(storage, error):
        return fault
    reason = str(error).split(" [source")[0].split(" [tensorstore_spec")[0]
    return UserError(
        f"The store {storage} is damaged: {array} of segment {segment} cannot be read ({reason[:300]}). Run python -m "
        f"jeagle.store prune {storage} --damaged, and then the extract command again: it makes only what is missing."
    )


def metadata_sha256(storage: Storage, key: str) -> str | None:
    """The fingerprint of an array's zarr.json as it is stored; None where there is none."""
    found = storage.read(f"{key}/zarr.json")
    return None if found is None else hashlib.sha256(found).hexdigest()[:16]


def _spec(storage: Storage, key: str, shape: Sequence[int], dtype: np.dtype, chunk: int) -> dict[str, Any]:
    length, *entry = shape
    inner = max(1, min(chunk, _CHUNK_BYTES // max(math.prod(entry) * dtype.itemsize, 1), length))
    shard = max(-(-length // inner), 1) * inner
    codec = {"chunk_shape": [inner, *entry], "codecs": [_LITTLE, _CRC], "index_codecs": [_LITTLE, _CRC]}
    metadata = {
        "shape": [length, *entry],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *entry]}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }
    return {"driver": "zarr3", "kvstore": storage.kvstore(f"{key}/"), "metadata": metadata}
