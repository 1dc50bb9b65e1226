"""Faults of an export that vLLM loads without a message: each must change what it accepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
Tree = dict[str, Any]
Fault = Callable[[Tree, dict[str, np.ndarray]], bool]


def missing_fc(config: Tree, tensors: dict[str, np.ndarray]) -> bool:
    return tensors.pop("fc.weight", None) is not None


def layer_ids_off_by_one(config: Tree, tensors: dict[str, np.ndarray]) -> bool:
    for tree in (config, config.get("eagle_config", {})):
        if LAYER_IDS in tree:
            tree[LAYER_IDS] = [layer + 1 for layer in tree[LAYER_IDS]]
    return True


def no_d2t(config: Tree, tensors: dict[str, np.ndarray]) -> bool:
    return tensors.pop("d2t", None) is not None


def lost_rope_scaling(config: Tree, tensors: dict[str, np.ndarray]) -> bool:
    layer = config.get("transformer_layer_config", config)
    theta = layer["rope_parameters"]["rope_theta"]
    layer["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return layer.pop("rope_scaling", None) is not None


def swapped_norms(config: Tree, tensors: dict[str, np.ndarray]) -> bool:
    one, other = first_layer(tensors, "input_layernorm"), first_layer(tensors, "hidden_norm")
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return True


def transposed_weight(config: Tree, tensors: dict[str, np.ndarray]) -> bool:
    """The matrix is square, so that its shape does not show the fault."""
    name = first_layer(tensors, "self_attn.o_proj")
    square = len(set(tensors[name].shape)) == 1
    if square:
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    return square


def first_layer(tensors: dict[str, np.ndarray], part: str) -> str:
    """Returns the name of a tensor of the first layer, which the plain layout calls midlayer."""
    return next(f"{layer}.{part}.weight" for layer in ("layers.0", "midlayer") if f"{layer}.{part}.weight" in tensors)


FAULTS: dict[str, Fault] = {
    "missing fc": missing_fc,
    "layer ids off by one": layer_ids_off_by_one,
    "no d2t": no_d2t,
    "lost rope scaling": lost_rope_scaling,
    "swapped norms": swapped_norms,
    "transposed weight": transposed_weight,
}


def plant(fault: str, export: Path, out: Path) -> bool:
    """Copies an export with one fault; returns False where this draft cannot have the fault."""
    shutil.copytree(export, out)
    config = json.loads((out / "config.json").read_text())
    with safe_open(out / "model.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    planted = FAULTS[fault](config, tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return planted
