"""A checkpoint's arrays, read one at a time and only when asked for, from a disk or from object storage.

`checkpoints.py` writes with Orbax: zarr arrays in an OCDBT store, and a `_METADATA` file that names them. Here they are
opened with tensorstore itself, so that a draft larger than memory can pass through.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jeagle.errors import UserError
from jeagle.runtime.checkpoints import chosen_step

Spec = dict[str, Any]
"""A tensorstore key-value store; its path ends in a slash."""


class SavedArray:
    """An array of a checkpoint. `array[...]` or `array[start:stop]` reads it, or those rows, anew each time."""

    def __init__(self, store: Spec, zarr: str, where: str):
        self._spec, self._where = {"driver": zarr, "kvstore": store}, where
        self._opened: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._array.dtype.numpy_dtype)

    @property
    def block_rows(self) -> int:
        """Rows that are stored together: reading fewer at a time decodes them more than once."""
        return int(self._array.chunk_layout.read_chunk.shape[0])

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):  # unlike numpy, tensorstore does not stop at an array's end by itself
            index = slice(*index.indices(self.shape[0]))
        try:
            return self._array[index].read().result()
        except (ValueError, RuntimeError, OSError) as error:
            raise _damaged(self._where, error) from error

    def read_into(self, out: np.ndarray) -> None:
        """Fills `out` with the whole array, block by block as they are stored: one of them is in memory besides."""
        blocks = self._array.chunk_layout.read_chunk.shape
        starts = (range(0, size, block) for size, block in zip(self.shape, blocks, strict=True))
        for corner in itertools.product(*starts):
            ends = (min(c + b, n) for c, b, n in zip(corner, blocks, self.shape, strict=True))
            piece = tuple(slice(*edges) for edges in zip(corner, ends, strict=True))
            out[piece] = self[piece]

    @property
    def _array(self) -> Any:
        if self._opened is None:
            try:
                self._opened = ts.open(self._spec, open=True).result()
            except (ValueError, RuntimeError, OSError) as error:
                raise _damaged(self._where, error) from error
        return self._opened


def local(folder: Path) -> Spec:
    return {"driver": "file", "path": f"{folder.absolute()}/"}


def open_saved(
    folder: Spec, step: int | str, *, where: str, scores: Mapping[int, float] | None = None
) -> tuple[int, dict[str, SavedArray]]:
    """(step, arrays by their path in the saved tree); nothing but their names is read.

    Args:
      folder: of the checkpoints, a folder a step.
      step, scores: as of `chosen_step`.
      where: the folder as the user knows it, for errors.

    Raises:
      UserError: when there is no such step, or what is there is no whole checkpoint.
    """
    try:
        keys = {key.decode() for key in ts.KvStore.open(folder).result().list().result()}
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{where} cannot be listed: {_first_line(error)}.") from error
    chosen = chosen_step(_finished(keys, where), step, where=where, scores=scores)
    inside = folder | {"path": f"{folder['path']}{chosen}/default/"}
    described = ts.KvStore.open(inside).result().read("_METADATA").result()
    try:
        tree = json.loads(bytes(described.value))
        names = [entry["key_metadata"][0]["key"] for entry in tree["tree_metadata"].values()]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(f"{where}/{chosen}", error) from error
    ocdbt, zarr = tree.get("use_ocdbt", True), "zarr3" if tree.get("use_zarr3") else "zarr"
    stores = {n: _below(inside, n, ocdbt=ocdbt) for n in names}
    return chosen, {n: SavedArray(store, zarr, f"{where}/{chosen}") for n, store in stores.items()}


def _finished(keys: set[str], where: str) -> list[int]:
    if not keys:
        raise UserError(f"{where} does not exist: the run has saved no checkpoint yet.")
    named = {key.split("/")[0] for key in keys}
    return [int(n) for n in named if n.isdigit() and f"{n}/default/_METADATA" in keys]


def _below(folder: Spec, name: str, *, ocdbt: bool) -> Spec:
    if ocdbt:
        return {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
    return folder | {"path": f"{folder['path']}{name}/"}


def _damaged(where: str, error: Exception) -> UserError:
    return UserError(f"The checkpoint {where} is incomplete or damaged ({_first_line(error)}): take another step.")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
