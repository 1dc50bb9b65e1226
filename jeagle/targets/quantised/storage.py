"""Arrays in files: exactly the bytes of a slice are read, into memory of its size, and nothing is mapped.

A mapped file's pages count as the process's memory until the system takes them back; what is read by position does not.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.quantised.views import Index

# safetensors' names of types. Those narrower than a byte are not among them.
DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
_MAX_HEADER = 100_000_000  # the format's own bound


@dataclass(frozen=True)
class StoredArray:
    """A View of an array that lies row by row in a file, from `offset` on."""

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index) -> np.ndarray:
        sizes = tuple(part.stop - part.start for part in index)
        out = np.empty(math.prod(sizes) * self.dtype.itemsize, np.uint8)
        if out.size:
            self._fill(out.data, index)
        return out.view(self.dtype).reshape(sizes)

    def _fill(self, out: memoryview, index: Index) -> None:
        """Reads run by run: the last axes that are wanted whole, and the one before them, lie in one piece."""
        strides = [math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.shape))]
        starts = [range(part.start * n, part.stop * n, n) for part, n in zip(index, strides, strict=True)]
        cut = [axis for axis, size in enumerate(self.shape) if len(starts[axis]) != size]
        last = cut[-1] if cut else 0
        run = len(starts[last]) * strides[last] if index else self.dtype.itemsize
        outer = starts[:last] + [range(part.start, part.start + 1) for part in starts[last : last + 1]]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for number, offsets in enumerate(itertools.product(*outer)):
                self._read_run(descriptor, out[number * run : (number + 1) * run], self.offset + sum(offsets))
        finally:
            os.close(descriptor)

    def _read_run(self, descriptor: int, out: memoryview, start: int) -> None:
        while out:
            count = os.preadv(descriptor, [out], start)  # the system may give less than asked for
            if not count:
                raise UserError(f"The target's file {self.path} is cut short at its tensor {self.name}: get it again.")
            out, start = out[count:], start + count


def safetensors_arrays(path: Path) -> dict[str, StoredArray]:
    """Name -> array of a safetensors file, whose header alone is read.

    Raises:
      UserError: for a file that is missing, cut short, or whose header is broken or names a type that is not known.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(size - 8, _MAX_HEADER) else None
    except FileNotFoundError as error:
        raise UserError(f"The target's file {path} is missing: download it again.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"The target's file {path} cannot be read ({error}): download it again.") from error
    if not isinstance(header, dict):
        raise UserError(f"The target's file {path} cannot be read: its header is cut short or damaged.")
    return {name: _array(path, name, entry, 8 + length, size) for name, entry in header.items() if name[:2] != "__"}


def _array(path: Path, name: str, entry: dict, base: int, size: int) -> StoredArray:
    try:
        kind, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        start, stop = (base + int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The target's file {path} cannot be read: its header's entry {name} is damaged.") from error
    if kind not in DTYPES:
        raise UserError(f"The target's tensor {name} in {path} is of the type {kind}, which is not supported.")
    dtype = np.dtype(DTYPES[kind])
    if stop - start != math.prod(shape) * dtype.itemsize or start < base:
        raise UserError(f"The target's file {path} cannot be read: its header's entry {name} contradicts itself.")
    if stop > size:
        raise UserError(
            f"The target's file {path} cannot be read: it is cut short at its tensor {name} ({size} bytes of at least "
            f"{stop}); download it again."
        )
    return StoredArray(path, name, start, shape, dtype)
