"""Views: arrays that are read slice by slice from files, and how they become the tensors of a Hugging Face checkpoint.

Every view reads only what its slice needs of the views that it is made of, down to `StoredArray`, bytes of a file.
"""

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
DTYPES = {f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)}
DTYPES |= {"BOOL": np.dtype(bool), "F16": np.dtype("f2"), "F32": np.dtype("f4"), "F64": np.dtype("f8")}
DTYPES |= {"BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
DTYPES |= {"F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)}
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
        array = np.empty(math.prod(sizes) * self.dtype.itemsize, np.uint8)
        if not array.size:
            return array.view(self.dtype).reshape(sizes)
        # Contiguous runs are read: of the last axes that are read entirely, and the axis before them.
        strides = [math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.shape))]
        starts = [range(part.start * n, part.stop * n, n) for part, n in zip(index, strides, strict=True)]
        cut = [axis for axis, size in enumerate(self.shape) if len(starts[axis]) != size]
        last = cut[-1] if cut else 0
        run = len(starts[last]) * strides[last] if index else self.dtype.itemsize
        outer = starts[:last] + [range(part.start, part.start + 1) for part in starts[last : last + 1]]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for number, offsets in enumerate(itertools.product(*outer)):
                out, start = array.data[number * run : (number + 1) * run], self.offset + sum(offsets)
                while out:
                    count = os.preadv(descriptor, [out], start)  # which may read less than was asked for
                    if not count:
                        raise UserError(
                            f"The target's file {self.path} is cut short at its tensor {self.name}: get it again."
                        )
                    out, start = out[count:], start + count
        finally:
            os.close(descriptor)
        return array.view(self.dtype).reshape(sizes)


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
    arrays = {}
    for name, entry in header.items():
        if name.startswith("__"):
            continue
        try:
            kind, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            damaged = f"The target's file {path} cannot be read: its header's entry {name} is damaged."
            raise UserError(damaged) from error
        if kind not in DTYPES:
            raise UserError(f"The target's tensor {name} in {path} is of the type {kind}, which is not supported.")
        if stop - start != math.prod(shape) * DTYPES[kind].itemsize or start < 8 + length:
            raise UserError(f"The target's file {path} cannot be read: its header's entry {name} contradicts itself.")
        if stop > size:
            raise UserError(
                f"The target's file {path} cannot be read: it is cut short at its tensor {name} ({size} bytes of at "
                f"least {stop}); download it again."
            )
        arrays[name] = StoredArray(path, name, start, shape, DTYPES[kind])
    return arrays


class WeightSource:
    """A target's configuration and named arrays, whose views are given."""

    config: dict[str, Any]
    """As in Hugging Face's config.json; eos_token_id may be a list."""

    def __init__(self, path: Path, views: dict[str, View]):
        self._path, self._views = path, views

    def names(self) -> list[str]:
        """The sorted names of the tensors, such as model.layers.0.self_attn.q_proj.weight."""
        return sorted(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; a matrix is [out, in]. Raises UserError for a name that does not exist."""
        return self._view(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The type of what `read` returns."""
        return self._view(name).dtype

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or only its part at `index`, which has a slice with step 1 for each axis."""
        view = self._view(name)
        return view.read(full_index(index, view.shape))

    def _view(self, name: str) -> View:
        if name not in self._views:
            raise UserError(f"The target {self._path} has no tensor {name}: is its download complete?")
        return self._views[name]


@dataclass(frozen=True)
class Computed:
    """A view whose parts are computed from those of other views."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]


def reordered(base: View, order: np.ndarray) -> View:
    """Row r is row `order[r]` of the base."""

    def read(index: Index) -> np.ndarray:
        rows = order[index[0]]
        low, high = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return base.read((slice(low, high), *index[1:]))[rows - low]

    return Computed(base.shape, base.dtype, read)


def mapped(base: View, function: Callable[[np.ndarray], np.ndarray]) -> View:
    """A function applied to every element."""
    return Computed(base.shape, base.dtype, lambda index: function(base.read(index)))


def picked(base: View, entry: int) -> View:
    """One entry of the first axis, such as one expert of a stack; the axis is dropped."""
    return Computed(base.shape[1:], base.dtype, lambda index: base.read((slice(entry, entry + 1), *index))[0])


def swapped(base: View) -> View:
    """The transpose: the last two axes are exchanged."""

    def read(index: Index) -> np.ndarray:
        *lead, columns, rows = index
        return base.read((*lead, rows, columns)).swapaxes(-1, -2)

    *lead, rows, columns = base.shape
    return Computed((*lead, columns, rows), base.dtype, read)


def as_row(base: View) -> View:
    """A vector as a matrix of one row; a matrix stays as it is."""
    if len(base.shape) == 2:
        return base
    return Computed((1, *base.shape), base.dtype, lambda index: base.read(index[1:])[None][index[0]])


def flattened(base: View) -> View:
    """The first two axes are merged."""
    outer_size, inner, *rest = base.shape

    def read(index: Index) -> np.ndarray:
        start, stop = index[0].start, index[0].stop
        parts = [np.zeros((0, *(part.stop - part.start for part in index[1:])), base.dtype)]
        while start < stop:
            outer, first = divmod(start, inner)
            last = min(first + stop - start, inner)
            parts.append(base.read((slice(outer, outer + 1), slice(first, last), *index[1:]))[0])
            start += last - first
        return np.concatenate(parts)

    return Computed((outer_size * inner, *rest), base.dtype, read)


def joined(parts: Sequence[View], axis: int) -> View:
    """The parts concatenated along an axis."""
    sizes = [part.shape[axis] for part in parts]
    offsets = [0, *itertools.accumulate(sizes)]

    def read(index: Index) -> np.ndarray:
        arrays = []
        for part, offset, size in zip(parts, offsets, sizes, strict=False):
            start, stop = (min(max(edge - offset, 0), size) for edge in (index[axis].start, index[axis].stop))
            arrays.append(part.read((*index[:axis], slice(start, stop), *index[axis + 1 :])))
        return np.concatenate(arrays, axis)

    return Computed((*parts[0].shape[:axis], offsets[-1], *parts[0].shape[axis + 1 :]), parts[0].dtype, read)


def interleaved(parts: Sequence[View]) -> View:
    """Two parts interleaved along the last axis: a0 b0 a1 b1 ..."""

    def read(index: Index) -> np.ndarray:
        start, stop = index[-1].start, index[-1].stop
        out = np.empty([part.stop - part.start for part in index], parts[0].dtype)
        for which, part in enumerate(parts):
            first, last = (start + 1 - which) // 2, (stop + 1 - which) // 2
            out[..., (which - start) % 2 :: 2] = part.read((*index[:-1], slice(first, last)))
        return out

    *lead, size = parts[0].shape
    return Computed((*lead, 2 * size), parts[0].dtype, read)
