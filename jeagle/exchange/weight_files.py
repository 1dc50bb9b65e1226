"""Opens the weight files of a draft's folder, safetensors or torch's .bin and .pt, and reads tensors one at a time.

Files of torch.save are read without torch and without running code: tensors, numbers, strings, dicts and lists. A
pickle may ask for any function to be called; this reader knows a few names and refuses all others.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gzip
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jeagle.errors import UserError
from jeagle.exchange.draft_tensors import D2T, T2D, LazyArray, canonical_tensor_name

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPUTED = "rotary_emb.inv_freq"  # follows from config.json
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


def open_tensors(folder: Path) -> dict[str, LazyArray]:
    """Returns every tensor of a folder, in torch's orientation, by its canonical name.

    Raises:
      UserError: for a folder without weights, a truncated or damaged file, a pickle that would run code, two tensors of
        the same name, or a type that no draft is stored in.
    """
    tensors: dict[str, LazyArray] = {}
    for path in _weight_files(folder):
        reader = _safetensors if path.suffix == ".safetensors" else _torch
        for torch_name, dtype, tensor in reader(path):
            name = canonical_tensor_name(torch_name)
            if name.endswith(_COMPUTED):
                continue
            if name in tensors:
                raise UserError(f"{path}: {name} is present twice, under this name and as {torch_name}.")
            if name not in (D2T, T2D) and dtype not in (*_FLOATS, *_FLOATS.values()):
                raise UserError(f"{path}: {torch_name} is {dtype.lower()}; expected {', '.join(_FLOATS.values())}.")
            tensors[name] = tensor
    return tensors


def _safetensors(path: Path) -> Iterator[tuple[str, str, LazyArray]]:
    def read(name: str, index: Any) -> np.ndarray:
        with _opened(path) as file:
            if index is ...:
                return file.get_tensor(name)
            view = file.get_slice(name)
            return view[slice(*index.indices(view.get_shape()[0]))]  # unlike numpy, it refuses an end beyond the array

    with _opened(path) as file:
        for name in sorted(file.keys()):
            view = file.get_slice(name)
            dtype = view.get_dtype()
            dtype = _FLOATS.get(dtype, dtype.replace("I", "int") if dtype.startswith("I") else dtype)
            yield name, dtype, LazyArray(tuple(view.get_shape()), functools.partial(read, name))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, OSError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Was the copy of the file complete?") from error


def _torch(path: Path) -> Iterator[tuple[str, str, LazyArray]]:
    tree = read_torch(path)
    tree = tree["state_dict"] if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(array, np.ndarray) for array in tree.values()):
        raise UserError(f"{path} does not contain a dict of tensors, as torch.save writes it of a model's state.")
    for name, array in tree.items():
        yield str(name), array.dtype.name, LazyArray(array.shape, array.__getitem__)


def _weight_files(folder: Path) -> list[Path]:
    """A name such as model-00001-of-00002.safetensors says how many parts there must be."""
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        if files := sorted(folder.glob(pattern)):
            count = files[0].stem.rpartition("-of-")[2]
            if count.isdigit() and len(files) != int(count):
                raise UserError(f"{folder} contains {len(files)} of {int(count)} parts: copy the missing ones too.")
            return files
    others = sorted(p for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if len(others) == 1:
        return others
    hint = f": it contains {', '.join(p.name for p in others)}; rename the right one" if others else ""
    raise UserError(f"{folder} contains no model.safetensors and no pytorch_model.bin{hint}.")


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
