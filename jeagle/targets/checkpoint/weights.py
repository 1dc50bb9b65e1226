"""A target's weights by Hugging Face's names, whatever file format they are stored in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.checkpoint.reference import TargetFiles
from jeagle.targets.quantised.methods import dequantised
from jeagle.targets.quantised.views import Index, NamedViews, safetensors_arrays


@runtime_checkable
class WeightSource(Protocol):
    """A target's configuration and named arrays."""

    config: dict[str, Any]
    """As in Hugging Face's config.json; eos_token_id may be a list."""

    def names(self) -> list[str]:
        """The sorted names of the tensors, such as model.layers.0.self_attn.q_proj.weight."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; a matrix is [out, in]. Raises UserError for a name that does not exist."""

    def dtype(self, name: str) -> np.dtype:
        """The type of what `read` returns."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads a tensor, or only its part at `index`, which has a slice with step 1 for each axis."""


def open_weights(files: TargetFiles) -> WeightSource:
    """Opens the weights of a resolved target, without reading any array yet.

    Raises:
      UserError: for a file that is missing, cut short or of an unsupported kind, naming it (and the tensor).
    """
    if files.format == "gguf":
        from jeagle.targets.gguf.weights import GgufWeights  # the gguf package takes a second to import

        return GgufWeights(files.path)
    return SafetensorsWeights(files.path)


class SafetensorsWeights(NamedViews):
    """A folder of config.json and one or more safetensors files.

    Weights that were published in fp8, int8 or MXFP4 are dequantised as they are read (see `quantised.methods`): names,
    shapes and `config` are those of the unquantised checkpoint.
    """

    def __init__(self, folder: Path):
        self.config, quantisation = _read_config(folder)
        files = {file: safetensors_arrays(folder / file) for file in _shards(folder)}
        file_of = {name: file for file, arrays in files.items() for name in arrays}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            for name, file in read_json(index)["weight_map"].items():
                if file_of.get(name) != file:
                    raise UserError(f"The target's tensor {name} is not in {folder / file}, as {index.name} says.")
        arrays = {name: array for in_file in files.values() for name, array in in_file.items()}
        super().__init__(folder, dequantised(arrays, quantisation, folder))


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns config.json without its quantisation, and the quantisation."""
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    entries = [part.pop("quantization_config", None) for part in (config, text)]
    entries += [part.pop("compression_config", None) for part in (config, text)]  # the older name of compressed-tensors
    quantisation = next((entry for entry in entries if entry), None)
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models often name the end of a turn only there
        ends = as_ids(config.get("eos_token_id")) + as_ids(read_json(generation).get("eos_token_id"))
        unique = list(dict.fromkeys(ends))
        config["eos_token_id"] = unique if len(unique) != 1 else unique[0]
    return config, quantisation


def _shards(folder: Path) -> list[str]:
    """File names of the model's shards: those that its index lists, or else the only file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"The index {index} has no weight_map: download it again.")
        return sorted(set(weight_map.values()))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(
            f"The target folder {folder} has {len(files)} safetensors files and no model.safetensors.index.json, which "
            "says which of them belong together: copy the model's own there."
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model's folder. Raises UserError if it is missing or damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The target's {path} cannot be read ({error}): download it again.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The target's {path} is not a JSON object: download it again.")
    return tree


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Returns the token ids of a configuration's value, which may be one id, several or none."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
