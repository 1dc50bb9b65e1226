"""Arrays that are read slice by slice: how the tensors of a file become those of a Hugging Face checkpoint.

Every view reads only what its slice needs of the views beneath it, down to `View`s over the bytes of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jeagle.errors import UserError

Index = tuple[slice, ...]


class View(Protocol):
    """An array that is not in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index) -> np.ndarray:
        """The part that `index` cuts out: one slice an axis, with start and stop within the shape, step 1."""


def whole(index: Index | None, shape: tuple[int, ...]) -> Index:
    """`index` with every slice's start and stop spelled out; all of the array for None."""
    given = tuple(index or ()) + (slice(None),) * (len(shape) - len(index or ()))
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(given, shape, strict=True))


class NamedViews:
    """The arrays of a `weights.WeightSource`: views by name, out of the target at `path`."""

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
        return view.read(whole(index, view.shape))

    def _view(self, name: str) -> View:
        if name not in self._views:
            raise UserError(f"The target {self._path} has no tensor {name}: is its download complete?")
        return self._views[name]


@dataclass(frozen=True)
class _On:
    """What most views share: one view beneath them, whose shape and dtype are theirs too."""

    base: View

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype


@dataclass(frozen=True)
class Reordered(_On):
    """Row r is row `order[r]` of the base."""

    order: np.ndarray

    def read(self, index: Index) -> np.ndarray:
        rows = self.order[index[0]]
        low, high = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return self.base.read((slice(low, high), *index[1:]))[rows - low]


@dataclass(frozen=True)
class Mapped(_On):
    """A function of every element, such as adding a number."""

    function: Callable[[np.ndarray], np.ndarray]

    def read(self, index: Index) -> np.ndarray:
        return self.function(self.base.read(index))


@dataclass(frozen=True)
class Picked(_On):
    """One entry of the first axis, which falls away: expert e of a stack of experts."""

    entry: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape[1:]

    def read(self, index: Index) -> np.ndarray:
        return self.base.read((slice(self.entry, self.entry + 1), *index))[0]


class Swapped(_On):
    """The last two axes exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.base.shape
        return (*lead, columns, rows)

    def read(self, index: Index) -> np.ndarray:
        *lead, columns, rows = index
        return self.base.read((*lead, rows, columns)).swapaxes(-1, -2)


class AsRow(_On):
    """A vector as a matrix of one row; a matrix as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape if len(self.base.shape) == 2 else (1, *self.base.shape)

    def read(self, index: Index) -> np.ndarray:
        if len(self.base.shape) == 2:
            return self.base.read(index)
        return self.base.read(index[1:])[None][index[0]]


class Flattened(_On):
    """The first two axes as one."""

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
class _OnSeveral:
    """What views of several views share."""

    parts: Sequence[Any]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype


@dataclass(frozen=True)
class Joined(_OnSeveral):
    """Parts one after another along an axis."""

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


class Interleaved(_OnSeveral):
    """Two parts taken in turn along the last axis: a0 b0 a1 b1 ..."""

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
