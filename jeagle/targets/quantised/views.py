"""Views: arrays that are read slice by slice from files, and how they become the tensors of a Hugging Face checkpoint.

Every view reads only what its slice needs of the views that it is made of, down to `StoredArray`, bytes of a file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from jeagle.errors import UserError

# numpy types by safetensors' names; types narrower than a byte are not supported.
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

Index = tuple[slice, ...]


@runtime_checkable
class View(Protocol):
    """An array that is not in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index) -> np.ndarray:
        """Returns the part at `index`, which has a slice for each axis, with start and stop within it and step 1."""


def full_index(index: Index | None, shape: tuple[int, ...]) -> Index:
    """Returns `index` with a start and a stop in every slice, for every axis of the shape; None means all of it."""
    given = tuple(index or ()) + (slice(None),) * (len(shape) - len(index or ()))
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(given, shape, strict=True))


@dataclass(frozen=True)
class StoredArray:
    """A view of an array that is stored row by row in a file, starting at byte `offset`.

    Exactly the bytes of a slice are read, into memory of its size. The file is not mapped, since mapped pages count as
    the process's memory until the system takes them back.
    """

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
        """Reads contiguous runs: of the last axes that are read entirely, and the axis before them."""
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
            count = os.preadv(descriptor, [out], start)  # which may read less than was asked for
            if not count:
                raise UserError(f"The target's file {self.path} is cut short at its tensor {self.name}: get it again.")
            out, start = out[count:], start + count


def safetensors_arrays(path: Path) -> dict[str, StoredArray]:
    """Returns the arrays of a safetensors file by name; only its header is read.

    Raises:
      UserError: for a file that is missing or cut short, and for a header that is damaged or has an unknown type.
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


class NamedViews:
    """The arrays of a `weights.WeightSource`: views by name, of the target at `path`."""

    def __init__(self, path: Path, views: dict[str, View]):
        self._path, self._views = path, views

    def names(self) -> list[str]:
        return sorted(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._view(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._view(name).dtype

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        view = self._view(name)
        return view.read(full_index(index, view.shape))

    def _view(self, name: str) -> View:
        if name not in self._views:
            raise UserError(f"The target {self._path} has no tensor {name}: is its download complete?")
        return self._views[name]


@dataclass(frozen=True)
class _OfOne:
    """Base of views of one other view, with its shape and dtype."""

    base: View

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype


@dataclass(frozen=True)
class Reordered(_OfOne):
    """Row r is row `order[r]` of the base."""

    order: np.ndarray

    def read(self, index: Index) -> np.ndarray:
        rows = self.order[index[0]]
        low, high = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return self.base.read((slice(low, high), *index[1:]))[rows - low]


@dataclass(frozen=True)
class Mapped(_OfOne):
    """A function applied to every element."""

    function: Callable[[np.ndarray], np.ndarray]

    def read(self, index: Index) -> np.ndarray:
        return self.function(self.base.read(index))


@dataclass(frozen=True)
class Picked(_OfOne):
    """One entry of the first axis, such as one expert of a stack; the axis is dropped."""

    entry: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape[1:]

    def read(self, index: Index) -> np.ndarray:
        return self.base.read((slice(self.entry, self.entry + 1), *index))[0]


class Swapped(_OfOne):
    """The transpose: the last two axes are exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.base.shape
        return (*lead, columns, rows)

    def read(self, index: Index) -> np.ndarray:
        *lead, columns, rows = index
        return self.base.read((*lead, rows, columns)).swapaxes(-1, -2)


class AsRow(_OfOne):
    """A vector as a matrix of one row; a matrix stays as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape if len(self.base.shape) == 2 else (1, *self.base.shape)

    def read(self, index: Index) -> np.ndarray:
        if len(self.base.shape) == 2:
            return self.base.read(index)
        return self.base.read(index[1:])[None][index[0]]


class Flattened(_OfOne):
    """The first two axes are merged."""

    @property
    def shape(self) -> tuple[int, ...]:
        outer, inner, *rest = self.base.shape
        return (outer * inner, *rest)

    def read(self, index: Index) -> np.ndarray:
        inner, (start, stop) = self.base.shape[1], (index[0].start, index[0].stop)
        parts = [np.zeros((0, *(part.stop - part.start for part in index[1:])), self.dtype)]
        while start < stop:
            outer, first = divmod(start, inner)
            last = min(first + stop - start, inner)
            parts.append(self.base.read((slice(outer, outer + 1), slice(first, last), *index[1:]))[0])
            start += last - first
        return np.concatenate(parts)


@dataclass(frozen=True)
class _OfSeveral:
    """Base of views of several other views, with the dtype of the first."""

    parts: Sequence[Any]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype


@dataclass(frozen=True)
class Joined(_OfSeveral):
    """The parts concatenated along an axis."""

    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def read(self, index: Index) -> np.ndarray:
        read, offset, wanted = [], 0, index[self.axis]
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = (min(max(edge - offset, 0), size) for edge in (wanted.start, wanted.stop))
            read.append(part.read((*index[: self.axis], slice(start, stop), *index[self.axis + 1 :])))
            offset += size
        return np.concatenate(read, self.axis)


class Interleaved(_OfSeveral):
    """Two parts interleaved along the last axis: a0 b0 a1 b1 ..."""

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, size = self.parts[0].shape
        return (*lead, 2 * size)

    def read(self, index: Index) -> np.ndarray:
        start, stop = index[-1].start, index[-1].stop
        out = np.empty([part.stop - part.start for part in index], self.dtype)
        for which, part in enumerate(self.parts):
            first, last = (start + 1 - which) // 2, (stop + 1 - which) // 2
            out[..., (which - start) % 2 :: 2] = part.read((*index[:-1], slice(first, last)))
        return out
