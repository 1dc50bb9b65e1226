"""Reads files of torch.save without torch and without running code: tensors, numbers, strings, dicts and lists.

A pickle may ask for any function to be called; this reader knows a few names and refuses all others.
"""

import collections
import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jeagle.errors import UserError

_STORAGES: dict[str, Any] = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "Float8_e4m3fnStorage": ml_dtypes.float8_e4m3fn,
}


def read_torch(path: Path) -> Any:
    """Returns the tree in a file of torch.save (its zip form, which may be gzipped) with tensors as numpy arrays.

    Raises:
      UserError: for a file of another form, a damaged file, or one that asks for anything but tensors.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            pickled = next(name for name in names if name.endswith("/data.pkl") or name == "data.pkl")
            prefix = pickled.removesuffix("data.pkl")
            if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
                raise UserError(f"{path} was written on a big-endian machine, which this reader does not support.")
            return _Unpickler(path, archive, prefix, archive.read(pickled)).load()
    except (OSError, EOFError, LookupError, StopIteration, ValueError, zipfile.BadZipFile, pickle.PickleError) as error:
        raise UserError(f"{path} is not a complete file of torch.save ({type(error).__name__}: {error}).") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str, data: bytes):
        super().__init__(io.BytesIO(data))
        self._path, self._archive, self._prefix = path, archive, prefix
        self._loaded: dict[str, np.ndarray] = {}

    def _refusal(self, name: str) -> UserError:
        return UserError(
            f"{self._path} asks for {name} to be called: reading it might run code, so jeagle does not read it. It may "
            "contain only tensors, numbers, strings, dicts and lists."
        )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _tensor if name == "_rebuild_tensor_v2" else lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return np.dtype(_STORAGES[name])  # in the place of the storage class
        raise self._refusal(f"{module}.{name}")

    def persistent_load(self, key: Any) -> np.ndarray:
        kind, storage, name, _, count = key
        if kind != "storage" or not isinstance(storage, np.dtype):
            raise self._refusal(str(kind))
        if name not in self._loaded:
            data = self._archive.read(f"{self._prefix}data/{name}")
            self._loaded[name] = np.frombuffer(data, storage)[:count]
        return self._loaded[name]


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """Returns a copy of a view of a storage, which must lie inside it."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()
