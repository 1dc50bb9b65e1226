"""The arrays of a segment: zarr3, one shard each, with inner chunks whose crc32c is checked whenever they are read.

Of tensorstore's drivers only zarr3 stores an array in one file, reads a few positions of it, and notices a flipped
byte; docs/offline.md has the measurements.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
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
