"""Reading a target's weights by Hugging Face's names, whatever file they lie in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  lets numpy, and through it safetensors, hold bfloat16
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.reference import TargetFiles

Index = tuple[slice, ...]


class WeightSource(Protocol):
    """A target's configuration and named arrays."""

    config: dict[str, Any]
    """As in Hugging Face's config.json; eos_token_id may be a list."""

    def names(self) -> list[str]:
        """Parameter names such as model.layers.0.self_attn.q_proj.weight, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape. Matrices lie [out, in]. UserError for a name that is not there."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """An array, or the part of it that `index` (one slice an axis, step 1) cuts out; only that part is read."""


def open_weights(files: TargetFiles) -> WeightSource:
    """The weights of a resolved target; opens files but reads no array yet.

    Raises:
      UserError: for a file that is missing, cut short or of an unsupported kind, naming it (and the tensor).
    """
    if files.format == "gguf":
        from jeagle.targets.gguf_file import GgufWeights  # the gguf package takes a second to import

        return GgufWeights(files.path)
    return SafetensorsWeights(files.path)


class SafetensorsWeights:
    """A folder of config.json and one or more safetensors files."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.config = _read_config(folder)
        self._files = {file: _open(folder / file) for file in _shards(folder)}
        self._where = {name: file for file, opened in self._files.items() for name in sorted(opened.keys())}
        self._check_index()

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        view = self._slice(name)
        with _told(self._folder / self._where[name], f"its tensor {name}"):
            return view[index] if index else self._files[self._where[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise UserError(f"The target {self._folder} has no tensor {name}: is its download complete?")
        return self._files[self._where[name]].get_slice(name)

    def _check_index(self) -> None:
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            for name, file in read_json(index)["weight_map"].items():
                if self._where.get(name) != file:
                    raise UserError(
                        f"The target's tensor {name} is not in {self._folder / file}, as {index.name} says."
                    )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method", "unnamed")
        raise UserError(
            f"The target {folder} is quantised ({method}), which is not supported in safetensors: give the original "
            "bfloat16 model, or a GGUF."
        )
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models often name the end of a turn only here
        ends = as_ids(config.get("eos_token_id")) + as_ids(read_json(generation).get("eos_token_id"))
        unique = list(dict.fromkeys(ends))
        config["eos_token_id"] = unique if len(unique) != 1 else unique[0]
    return config


def _shards(folder: Path) -> list[str]:
    """File names of the model's shards: those that its index lists, or else the one file that holds it all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"The index {index} has no weight_map: download it again.")
        return sorted(set(weight_map.values()))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"The target folder {folder} has {len(found)} safetensors files and no model.safetensors.index.json, which "
            "says what belongs together: copy the model's own there."
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. UserError if it is missing or broken."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The target's {path} cannot be read ({error}): download it again.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The target's {path} is not a JSON object: download it again.")
    return tree


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids from a configuration's value, which may be one, several or none."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    with _told(path, "the file"):
        return safe_open(path, framework="numpy")


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Turns the safetensors library's errors into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"The target's file {path} is missing: download it again.") from error
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(
            f"The target's {path} cannot be read: {what} is damaged or of an unknown type ({error})."
        ) from error
