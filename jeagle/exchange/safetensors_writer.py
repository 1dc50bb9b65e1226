"""Writes a safetensors file tensor by tensor and block by block, so that only one block is in memory at a time.

A draft's parameters are transposed to torch's orientation, rounded to the stored type, and checked for NaN on the way.

Source of the format: the safetensors specification. A file has eight bytes with the header's length, the header (JSON:
the type, shape and data offsets of each tensor), and the data without gaps, row-major and little-endian.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") a type
import numpy as np
from jaxtyping import Shaped

from jeagle.errors import UserError
from jeagle.exchange.draft_tensors import Readable, check_finite, is_transposed, torch_name

EXPORT_DTYPES = ("bfloat16", "float16", "float32")

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}
_BLOCK = 1 << 22  # numbers that are converted at a time


class TensorPlan(NamedTuple):
    """A tensor that is going to be written.

    Attributes:
      dtype: name of a type in the file.
      shape: in the file.
      blocks: returns an iterator over the tensor's rows, some at a time and in order, in that type.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def plan_table(array: Shaped[np.ndarray, "..."]) -> TensorPlan:
    """Plans a small tensor that is in memory already and is written as it is."""
    return TensorPlan(array.dtype.name, array.shape, lambda: iter([array]))


def plan_parameter(name: str, array: Readable, dtype: str) -> TensorPlan:
    """Plans a parameter; `name` and `array` are jeagle's, so that a kernel is [in, out].

    Raises, while the tensor is written:
      UserError: for NaN, infinity, or a number that the type cannot represent.
    """
    transposed = is_transposed(name, array.shape)
    shape = array.shape[::-1] if transposed else array.shape
    return TensorPlan(dtype, shape, functools.partial(_blocks, name, array, dtype, transposed))


def _blocks(name: str, array: Readable, dtype: str, transposed: bool) -> Iterator[np.ndarray]:
    rows = array.shape[-1] if transposed else array.shape[0]
    step = max(_BLOCK * rows // max(math.prod(array.shape), 1), 1)
    if transposed:
        kernel = np.asarray(array[...])  # the file's rows are its columns, so it is read once
        for start in range(0, rows, step):
            yield _rounded(name, kernel[:, start : start + step].T, dtype)
        return
    stored = getattr(array, "block_rows", step)  # rows that are stored in one piece are read together
    span = -(-step // stored) * stored
    for begin in range(0, rows, span):
        piece = np.asarray(array[begin : begin + span])
        for start in range(0, len(piece), step):
            yield _rounded(name, piece[start : start + step], dtype)


def _rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds to nearest, ties to even, as IEEE arithmetic does."""
    with np.errstate(over="ignore"):
        stored = array.astype(np.dtype(dtype), order="C")
    if not np.isfinite(stored).all():
        check_finite(name, array, where="The draft's parameters")
        raise UserError(
            f"The parameter {torch_name(name, 'layers.0')} contains numbers that {dtype} cannot represent: store the "
            "export as bfloat16."
        )
    return stored


def write_safetensors(path: Path, tensors: Mapping[str, TensorPlan]) -> None:
    """Writes the file. Wide types come first and names are sorted, so that equal tensors give equal bytes.

    Raises:
      OSError: when the file cannot be written.
    """
    width = {name: np.dtype(plan.dtype).itemsize for name, plan in tensors.items()}
    order = sorted(tensors, key=lambda name: (-width[name], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        plan, start = tensors[name], end
        end += math.prod(plan.shape) * width[name]
        header[name] = {"dtype": _CODES[plan.dtype], "shape": list(plan.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in tensors[name].blocks():
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
