"""Runs in vLLM's environment with SGLang beside it: python in_sglang.py EXPORT TARGET; prints JSON.

SGLang's own draft class is built from the export's config.json on a CPU, filled with NaN, and loaded from its tensors
with SGLang's own `load_weights`. Every parameter must then be a tensor of the file, and every tensor be used: SGLang
reports neither. TARGET is the target's folder, of which config.json is read. No forward is run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from safetensors import safe_open


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that SGLang imports and this check does not need; nothing of SGLang's is replaced."""

    PACKAGES = ("IPython", "gguf", "torchvision")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__path__ = []
        module.__spec__ = spec
        return module

    def exec_module(self, module: Any) -> None:
        pass


def main(export: Path, target: Path) -> dict[str, Any]:
    from transformers.models.auto import processing_auto  # noqa: F401  # first, so that it finds no torchvision

    sys.meta_path.append(Absent())
    model, config = build(export)
    with safe_open(export / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.load_weights(iter(tensors.items()))
    wrong, used = compare(dict(model.named_parameters()), tensors)
    hot = model.get_hot_token_id()
    ids = None if hot is None else hot.tolist()
    return {
        "wrong": wrong,
        "unused": sorted(set(tensors) - used - {"d2t", "t2d"}),
        "target_ids": ids,
        "layers": captured(config, json.loads((target / "config.json").read_text())),
        "rope": rope(model),
        "parameters": len(list(model.parameters())),
    }


def build(export: Path) -> tuple[Any, Any]:
    """The draft at tensor parallel size 1 in float32, and its configuration as SGLang reads it."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import derive_spawn_ranks, get_context, get_parallel
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    args = ServerArgs(model_path=str(export), device="cpu")
    get_context().set_server_args(args)
    alone = dict.fromkeys(("tp_size", "attn_cp_size", "attn_tp_size", "moe_dp_size", "moe_ep_size"), 1)
    get_parallel().override_permanently(**derive_spawn_ranks(world_rank=0, ep_join_rank_offset=0, **alone))
    init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
    initialize_model_parallel(backend="gloo")
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

    config = AutoConfig.from_pretrained(export, trust_remote_code=False)
    torch.set_default_dtype(torch.float32)
    return LlamaForCausalLMEagle3(config), config


def compare(parameters: dict[str, Any], tensors: dict[str, Any]) -> tuple[list[str], set[str]]:
    """-> (parameters that are not what the file holds, the tensors that were found in a parameter)."""
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    file = {name.replace("midlayer.", "layers.0."): name for name in tensors}
    wrong, used = [], set()
    for name, parameter in parameters.items():
        plain = name.removeprefix("model.")
        fused = next((key for key in parts if f".{key}." in plain), "")
        names = [plain.replace(fused, part) for part in parts[fused]] if fused else [plain]
        if names == ["embed_tokens.weight"] and names[0] not in file:
            continue  # the target's is put there
        if not all(each in file for each in names):
            wrong.append(f"{name}: not in the file")
            continue
        used |= {file[each] for each in names}
        expected = torch.cat([tensors[file[each]] for each in names])
        held = parameter[: len(expected)]  # vocabularies are padded
        if held.shape != expected.shape or not torch.equal(held, expected.to(held.dtype)):
            wrong.append(f"{name}: differs")
    return wrong, used


def captured(config: Any, target: dict[str, Any]) -> list[int]:
    """Layers that SGLang's target of this kind would capture, counted as decoder layers that have run."""
    module = importlib.import_module(f"sglang.srt.models.{target['model_type']}")
    model = getattr(module, target["architectures"][0])
    ids = (getattr(config, "eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids")
    alone = types.SimpleNamespace(is_last_rank=True)
    config_of_target = types.SimpleNamespace(**target)
    stand_in = types.SimpleNamespace(pp_group=alone, config=config_of_target, model=types.SimpleNamespace())
    model.set_eagle3_layers_to_capture(stand_in, ids)
    return stand_in.model.layers_to_capture


def rope(model: Any) -> list[float]:
    """Cosines at position 100: what SGLang's rotary embedding makes of the configuration."""
    table = model.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    return table[100, : table.shape[1] // 2].tolist()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
