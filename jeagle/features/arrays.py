"""The arrays of a segment: zarr3, one shard each, with inner chunks whose crc32c is checked whenever they are read.

Of tensorstore's drivers only zarr3 stores an array in one file, reads a few positions of it, and notices a flipped
byte; docs/offline.md has the measurements.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from jeagle.errors import UserError
from jeagle.features.storage import Storage, named_faults, unreachable

_CHUNK_BYTES = 2**19  # the largest inner chunk, which is read at a time
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def write_array(storage: Storage, key: str, array: Shaped[np.ndarray, "N ..."], chunk: int) -> dict[str, Any]:
    """Writes an array [N, ...] at `key`; returns its description for the segment's manifest.

    Args:
      chunk: the most entries of an inner chunk.

    Raises:
      StorageFull: the disk is full.
    """
    array = np.ascontiguousarray(array)
    metadata = _metadata(array, chunk)
    spec = _spec(storage, key, metadata) | {"store_data_equal_to_fill_value": True}
    with named_faults(storage):
        ts.open(spec, create=True, open=False).result().write(array).result()
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "chunk": metadata["codecs"][0]["configuration"]["chunk_shape"][0],
        "crc32": checksum(array),
        "metadata_sha256": metadata_sha256(storage, key) or "",
    }


def checksum(array: Shaped[np.ndarray, "..."]) -> int:
    """The crc32 of an array's bytes."""
    flat: Any = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return zlib.crc32(flat)


def open_array(storage: Storage, key: str, described: dict[str, Any]) -> Any:
    """The tensorstore array at `key`. Nothing is read for it: the manifest describes all of it."""
    like = np.empty((0, *described["shape"][1:]), described["dtype"])
    metadata = _metadata(like, described["chunk"], described["shape"][0])
    spec = _spec(storage, key, metadata) | {"fill_missing_data_reads": False, "recheck_cached_data": False}
    return ts.open(spec, open=True, assume_metadata=True).result()


def read_into(out: Shaped[np.ndarray, "N ..."], array: Any, start: int, stop: int) -> Any:
    """Begins to read array[start:stop] into `out`; returns a future that is done when the bytes are there."""
    return ts.array(out).write(array[start:stop][ts.d[0].translate_to[0]])


def damage(store: object, segment: str, array: str, error: Exception) -> UserError:
    """A plain sentence for bytes that differ from those that were written, or for storage that does not give them."""
    if fault := unreachable(str(store), error):
        return fault
    reason = str(error).split(" [source")[0].split(" [tensorstore_spec")[0]
    return UserError(
        f"The store {store} is damaged: {array} of segment {segment} cannot be read ({reason[:300]}). Run python -m "
        f"jeagle.store prune {store} --damaged, and then the extract command again: it makes only what is missing."
    )


def metadata_sha256(storage: Storage, key: str) -> str | None:
    """The fingerprint of an array's zarr.json as it is stored; None where there is none."""
    found = storage.read(f"{key}/zarr.json")
    return None if found is None else hashlib.sha256(found).hexdigest()[:16]


def _metadata(array: np.ndarray, chunk: int, length: int | None = None) -> dict[str, Any]:
    length = array.shape[0] if length is None else length
    each = max(int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize, 1)
    inner = max(1, min(chunk, max(_CHUNK_BYTES // each, 1), max(length, 1)))
    shard = max(-(-length // inner), 1) * inner
    codec = {"chunk_shape": [inner, *array.shape[1:]], "codecs": [_LITTLE, _CRC], "index_codecs": [_LITTLE, _CRC]}
    return {
        "shape": [length, *array.shape[1:]],
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *array.shape[1:]]}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }


def _spec(storage: Storage, key: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": storage.kvstore(f"{key}/"), "metadata": metadata}
