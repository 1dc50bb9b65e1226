"""A parameter on its way into a file: turned as torch has it, rounded to the type asked for, and looked at for NaN."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from jeagle.errors import UserError
from jeagle.exchange.names import check_finite, is_kernel, torch_name
from jeagle.exchange.stream import TYPES, Planned, Readable

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES = ("bfloat16", "float16", "float32")

_BLOCK = 1 << 22  # numbers at a time


def planned(name: str, array: Readable, dtype: Dtype) -> Planned:
    """A parameter under jeagle's name, [in, out] where it is a kernel, as torch's file will hold it.

    Raises, while it is written:
      UserError: for NaN, infinity, or a number beyond the type's range.
    """
    turned = is_kernel(name, array.shape)
    shape = array.shape[::-1] if turned else array.shape
    return Planned(dtype, shape, functools.partial(_blocks, name, array, dtype, turned))


def _blocks(name: str, array: Readable, dtype: Dtype, turned: bool) -> Iterator[np.ndarray]:
    rows = array.shape[-1] if turned else array.shape[0]
    step = max(_BLOCK * rows // max(math.prod(array.shape), 1), 1)
    if turned:
        kernel = np.asarray(array[...])  # its columns are the file's rows: it is read once
        for start in range(0, rows, step):
            yield _rounded(name, kernel[:, start : start + step].T, dtype)
        return
    stored = getattr(array, "block_rows", step)  # what lies on disk in one piece is read at once
    span = -(-step // stored) * stored
    for begin in range(0, rows, span):
        piece = np.asarray(array[begin : begin + span])
        for start in range(0, len(piece), step):
            yield _rounded(name, piece[start : start + step], dtype)


def _rounded(name: str, array: np.ndarray, dtype: Dtype) -> np.ndarray:
    """To nearest, ties to even, as IEEE arithmetic rounds."""
    kind: Any = TYPES[dtype]
    with np.errstate(over="ignore"):
        stored = array.astype(kind, order="C")
    if not np.isfinite(stored).all():
        check_finite(name, array, where="The draft's parameters")
        raise UserError(
            f"The parameter {torch_name(name, 'layers.0')} holds numbers beyond {dtype}'s range: store the export as "
            "bfloat16."
        )
    return stored
