"""The tensors of a draft's folder, found by name and read one at a time: safetensors, or torch's own .bin and .pt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  lets safetensors return bfloat16 arrays
import numpy as np
from safetensors import SafetensorError, safe_open

from jeagle.errors import UserError
from jeagle.exchange.names import TABLES, canonical
from jeagle.exchange.torch_pickle import read_torch

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ALL = "float32, float16, bfloat16"
_COMPUTED = "rotary_emb.inv_freq"  # follows from config.json


class Tensor(NamedTuple):
    """A tensor that is read when asked for.

    Attributes:
      read: the array as torch lays it out, or those of its rows that a slice picks.
    """

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its canonical name.

    Raises:
      UserError: for no weights, a file that is cut or broken, one that asks for code to be run, a name that is there
        twice, or a type that no draft is stored in.
    """
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        reader = _safetensors if path.suffix == ".safetensors" else _torch
        for torch_name, dtype, tensor in reader(path):
            name = canonical(torch_name)
            if name.endswith(_COMPUTED):
                continue
            if name in found:
                raise UserError(f"{path}: {name} is there twice, as itself and as {torch_name}.")
            if name not in TABLES[1:] and dtype not in (*_FLOATS, *_FLOATS.values()):
                raise UserError(f"{path}: {torch_name} is {dtype.lower()}; expected {_ALL}.")
            found[name] = tensor
    return found


def _safetensors(path: Path) -> Iterator[tuple[str, str, Tensor]]:
    try:
        with safe_open(path, "numpy") as file:
            for name in sorted(file.keys()):
                view = file.get_slice(name)
                tensor = Tensor(tuple(view.get_shape()), functools.partial(_read, path, name))
                yield name, _numpy_name(view.get_dtype()), tensor
    except (SafetensorError, OSError, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path, name: str, index: Any) -> np.ndarray:
    try:
        with safe_open(path, "numpy") as file:
            if index is ...:
                return file.get_tensor(name)
            view = file.get_slice(name)
            return view[slice(*index.indices(view.get_shape()[0]))]  # which numpy does by itself
    except (SafetensorError, OSError, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read: {error}. Was it copied whole?")


def _numpy_name(dtype: str) -> str:
    return _FLOATS.get(dtype, dtype.replace("I", "int") if dtype.startswith("I") else dtype)


def _torch(path: Path) -> Iterator[tuple[str, str, Tensor]]:
    tree = read_torch(path)
    tree = tree["state_dict"] if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(array, np.ndarray) for array in tree.values()):
        raise UserError(f"{path} holds no dict of tensors, which is what torch.save writes of a model's state.")
    for name, array in tree.items():
        yield str(name), array.dtype.name, Tensor(array.shape, array.__getitem__)


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        if files := sorted(folder.glob(pattern)):
            _check_parts(files)
            return files
    others = sorted(p for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if len(others) == 1:
        return others
    named = f": it holds {', '.join(p.name for p in others)}, name one of them so" if others else ""
    raise UserError(f"{folder} holds no model.safetensors and no pytorch_model.bin{named}.")


def _check_parts(files: list[Path]) -> None:
    """UserError where a name such as model-00001-of-00002.safetensors tells of a part that is not there."""
    count = files[0].stem.rpartition("-of-")[2]
    if count.isdigit() and len(files) != int(count):
        raise UserError(f"{files[0].parent} holds {len(files)} of {int(count)} parts: copy the missing ones too.")
