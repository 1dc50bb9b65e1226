"""Opens the weight files of a draft's folder, safetensors or torch's .bin and .pt, and reads tensors one at a time."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jeagle.errors import UserError
from jeagle.exchange.draft_tensors import D2T, T2D, LazyArray, canonical_tensor_name
from jeagle.exchange.torch_pickle import read_torch

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPUTED = "rotary_emb.inv_freq"  # follows from config.json


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
