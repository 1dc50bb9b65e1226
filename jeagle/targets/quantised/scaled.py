"""Weights of one byte a number, with scales: their product, in float32, slice by slice."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.quantised.storage import StoredArray
from jeagle.targets.quantised.views import Index, whole


@dataclass(frozen=True)
class Scaled:
    """A View of a matrix (or a stack of matrices) times the scale of each of its blocks.

    Attributes:
      values: [..., out, in], of fp8 or int8.
      grid: the scales' shape, [..., ceil(out / rows), ceil(in / columns)]; leading axes may be 1.
      block: (rows, columns) of a block; those at the far edges may be smaller.

    The last two axes of a slice may cut through blocks. What is read beside the values are the scales that they need.
    """

    values: StoredArray
    scales: StoredArray
    grid: tuple[int, ...]
    block: tuple[int, int]
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, index: Index) -> np.ndarray:
        rows, columns = index[-2:]
        high, wide = self.block
        product = self.values.read(index).astype(np.float32)
        scales = np.take(self._scales(index[:-2]), np.arange(rows.start, rows.stop) // high, axis=-2)
        for number in range(columns.start // wide, -(-columns.stop // wide)):  # block by block: no second array
            start, stop = max(number * wide, columns.start), min((number + 1) * wide, columns.stop)
            product[..., start - columns.start : stop - columns.start] *= scales[..., number : number + 1]
        return product

    def _scales(self, lead: Index) -> np.ndarray:
        """Those of the leading entries, from all of them: they are few."""
        stored = _as_float32(self.scales.read(whole(None, self.scales.shape))).reshape(self.grid)
        return np.broadcast_to(stored, (*self.shape[:-2], *self.grid[-2:]))[lead]


def scaled(values: StoredArray, scales: StoredArray, block: tuple[int, int] | None) -> Scaled:
    """Values with their scales: one for each block of the stated size, for each row, or one for all.

    Raises:
      UserError: where the scales' shape is none of these.
    """
    *lead, rows, columns = values.shape
    sizes = [(1, columns), (rows, columns)]
    for size in [block, *sizes] if block else sizes:
        blocks = (-(-rows // size[0]), -(-columns // size[1]))
        for grid in ((*lead, *blocks), (*(1 for _ in lead), *blocks)):
            if _like(scales.shape, grid):
                return Scaled(values, scales, grid, size)
    raise UserError(
        f"The scales {scales.name} in {scales.path} are {scales.shape}, which fits neither the weight {values.name} of "
        f"{values.shape} nor its blocks of {block}: download the model again."
    )


def _like(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether two shapes differ in axes of size 1 alone."""
    return [n for n in shape if n != 1] == [n for n in grid if n != 1]


def _as_float32(scales: np.ndarray) -> np.ndarray:
    """Scales as numbers; bytes are exponents of two, less 127."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.astype(np.float32)
