"""A target's weights by Hugging Face's names, whatever file format they are stored in."""

import json
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.targets.checkpoint.reference import TargetFiles
from jeagle.targets.families.kinds import check_kinds
from jeagle.targets.quantised.methods import dequantised
from jeagle.targets.quantised.views import WeightSource, safetensors_arrays


def open_weights(files: TargetFiles) -> WeightSource:
    """Opens the weights of a resolved target, without reading any array yet.

    Raises:
      UserError: for a file that is missing, cut short or of an unsupported kind, naming it (and the tensor).
    """
    if files.format == "gguf":
        from jeagle.targets.gguf.weights import GgufWeights  # the gguf package takes a second to import

        return GgufWeights(files.path)
    return SafetensorsWeights(files.path)


class SafetensorsWeights(WeightSource):
    """A folder of config.json and one or more safetensors files.

    Weights that were published in fp8, int8 or MXFP4 are dequantised as they are read (see `quantised.methods`): names,
    shapes and `config` are those of the unquantised checkpoint.
    """

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        text = self.config.get("text_config") or {}
        # compression_config is the older name of compressed-tensors.
        kinds = [(part, kind) for kind in ("quantization_config", "compression_config") for part in (self.config, text)]
        quantisation = next(filter(None, [part.pop(kind, None) for part, kind in kinds]), None)
        generation = folder / "generation_config.json"
        if generation.is_file():  # chat models often name the end of a turn only there
            ends = as_ids(self.config.get("eos_token_id")) + as_ids(
                read_config(folder, generation.name).get("eos_token_id")
            )
            unique = list(dict.fromkeys(ends))
            self.config["eos_token_id"] = unique if len(unique) != 1 else unique[0]
        index = folder / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map") if index.is_file() else {}
        if not isinstance(weight_map, dict) or (index.is_file() and not weight_map):
            raise UserError(f"The index {index} has no weight_map: download it again.")
        shards = sorted(set(weight_map.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
        if not weight_map and "model.safetensors" in shards:
            shards = ["model.safetensors"]
        if not weight_map and len(shards) != 1:
            raise UserError(
                f"The target folder {folder} has {len(shards)} safetensors files and no {index.name}, which says which "
                "of them belong together: copy the model's own there."
            )
        arrays = {name: array for shard in shards for name, array in safetensors_arrays(folder / shard).items()}
        for name, file in weight_map.items():
            if name not in arrays or arrays[name].path != folder / file:
                raise UserError(f"The target's tensor {name} is not in {folder / file}, as {index.name} says.")
        super().__init__(folder, dequantised(arrays, quantisation, folder))


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Reads a configuration of a model's folder. Raises UserError, which names a field of the wrong kind."""
    tree = read_json(folder / name)
    check_kinds(tree, f"The target's {folder / name}")
    return tree


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
