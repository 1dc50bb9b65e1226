"""Reading a target's weights by Hugging Face's names, whatever file they lie in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.checkpoint.reference import TargetFiles
from jeagle.targets.quantised.methods import dequantised
from jeagle.targets.quantised.storage import safetensors_arrays
from jeagle.targets.quantised.views import Index, NamedViews


class WeightSource(Protocol):
    """A target's configuration and named arrays."""

    config: dict[str, Any]
    """As in Hugging Face's config.json; eos_token_id may be a list."""

    def names(self) -> list[str]:
        """Parameter names such as model.layers.0.self_attn.q_proj.weight, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape. Matrices lie [out, in]. UserError for a name that is not there."""

    def dtype(self, name: str) -> np.dtype:
        """Of what `read` returns."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """An array, or the part of it that `index` (one slice an axis, step 1) cuts out; only that part is read."""


def open_weights(files: TargetFiles) -> WeightSource:
    """The weights of a resolved target; opens files but reads no array yet.

    Raises:
      UserError: for a file that is missing, cut short or of an unsupported kind, naming it (and the tensor).
    """
    if files.format == "gguf":
        from jeagle.targets.gguf.weights import GgufWeights  # the gguf package takes a second to import

        return GgufWeights(files.path)
    return SafetensorsWeights(files.path)


class SafetensorsWeights(NamedViews):
    """A folder of config.json and one or more safetensors files.

    Weights that were published in fp8, int8 or MXFP4 are multiplied out on reading (`quantised_methods`): names, shapes
    and `config` are those of the unquantised checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.config, quantisation = _read_config(folder)
        files = {file: safetensors_arrays(folder / file) for file in _shards(folder)}
        self._where = {name: file for file, arrays in files.items() for name in arrays}
        self._check_index()
        arrays = {name: array for held in files.values() for name, array in held.items()}
        super().__init__(folder, dequantised(arrays, quantisation, folder))

    def _check_index(self) -> None:
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            for name, file in read_json(index)["weight_map"].items():
                if self._where.get(name) != file:
                    raise UserError(
                        f"The target's tensor {name} is not in {self._folder / file}, as {index.name} says."
                    )


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json without its quantisation, and the quantisation."""
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    found = [part.pop("quantization_config", None) for part in (config, text)]
    found += [part.pop("compression_config", None) for part in (config, text)]  # what compressed-tensors used to say
    quantisation = next((entry for entry in found if entry), None)
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models often name the end of a turn only here
        ends = as_ids(config.get("eos_token_id")) + as_ids(read_json(generation).get("eos_token_id"))
        unique = list(dict.fromkeys(ends))
        config["eos_token_id"] = unique if len(unique) != 1 else unique[0]
    return config, quantisation


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
