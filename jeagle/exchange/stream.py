"""A safetensors file written tensor by tensor and block by block: no more than a block of it is ever in memory.

Source of the format: the safetensors specification. Eight bytes with the header's length, the header (JSON: for each
tensor its type, shape and place among the data), then the data without gaps, row-major and little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}
TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "bool": np.bool_,
}


class Readable(Protocol):
    """What parameters are handed over as: a numpy array, or one that is read when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class Planned(NamedTuple):
    """A tensor that will be written.

    Attributes:
      dtype: a name of `NAMES`. shape: as the file says it.
      blocks: makes the tensor's rows, some at a time, in that type and in order.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(TYPES[self.dtype]).itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Writes the file; wide types first and names in order, so that equal tensors give equal bytes.

    Raises:
      OSError: when the place cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-np.dtype(TYPES[tensors[name].dtype]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        planned, start = tensors[name], end
        end += planned.nbytes
        header[name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in tensors[name].blocks():
                file.write(np.ascontiguousarray(block).view(np.uint8).data)


def whole(array: np.ndarray) -> Planned:
    """A small tensor that is in memory already."""
    return Planned(array.dtype.name, array.shape, lambda: iter([array]))
