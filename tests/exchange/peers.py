"""Folders with a draft as each trainer publishes it: its own names and config.json, written from the same weights.

Tensor names and configuration fields are those of the export code of SafeAILab/EAGLE, sgl-project/SpecForge,
NVIDIA/Model-Optimizer and NVIDIA-NeMo/Automodel (August 2026), and of speculators 0.9.0.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jeagle.interfaces import Rope
from tests.exchange.drafts import PLAIN, tensors_in, to_vllm
from tests.exchange.test_peer_features import torch_file

Arrays = dict[str, np.ndarray]
PEERS = ("eagle", "specforge", "sglang", "vllm", "speculators", "model_optimizer", "automodel")

SPEC = dataclasses.replace(PLAIN, rope=Rope(500000.0), max_positions=4096, norm_eps=1e-6)
CONFIG = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 40,
    "draft_vocab_size": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "eos_token_id": 2,
}


def weights(tmp_path, spec=SPEC):
    """The tensors that every peer publishes in its own form."""
    tensors = tensors_in(to_vllm(spec, tmp_path / "weights"))
    return {name.replace("midlayer.", "layers.0."): array for name, array in tensors.items()}


def write_peer(peer: str, folder: Path, weights: Arrays, config: dict[str, Any], **more: Any) -> Path:
    """Writes the draft as `peer` does.

    Args:
      weights: torch names with `layers.0.` for the first layer, and d2t and t2d where the vocabulary is reduced.
      config: of the decoder layer: hidden_size, num_attention_heads, ... vocab_size, and draft_vocab_size.
      more: fields that are put into config.json last.
    """
    folder.mkdir(parents=True)
    tree, named = WRITERS[peer](dict(config), weights)
    (folder / "config.json").write_text(json.dumps(tree | more))
    if peer == "eagle":
        (folder / "pytorch_model.bin").write_bytes(torch_file(named))
    else:
        save_file({n: np.ascontiguousarray(a) for n, a in named.items()}, folder / "model.safetensors")
    return folder


def _midlayer(weights: Arrays) -> Arrays:
    return {name.replace("layers.0.", "midlayer."): array for name, array in weights.items()}


def _eagle(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Called as its target is; neither layer ids nor an embedding; both tables even for a full vocabulary."""
    tables = {"d2t": np.zeros(config["draft_vocab_size"], np.int64), "t2d": np.ones(config["vocab_size"], bool)}
    named = tables | {name: array for name, array in weights.items() if name != "embed_tokens.weight"}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}, _midlayer(named)


def _specforge(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """`norm_output` means the norm before lm_head; layer ids count from 0, of layers that have run."""
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    tree = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **config, "eagle_config": ids}
    return tree, _midlayer(weights)


def _sglang(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    tree, named = _specforge(config, weights)
    return tree, {name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}": a for name, a in named.items()}


def _vllm(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Layer ids at the top count layers that have run."""
    ids = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    return {"architectures": ["Eagle3LlamaForCausalLM"], "model_type": "llama", **config, **ids}, _midlayer(weights)


def _speculators(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    flags = {n: config.pop(n, False) for n in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    tree = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config.pop("draft_vocab_size"),
        "target_hidden_size": config.pop("target_hidden_size", None),
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        **flags,
        "tie_word_embeddings": False,
        "transformer_layer_config": {"model_type": "llama"} | config,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "a/b", "architectures": []}},
    }
    return tree, dict(weights)


def _model_optimizer(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """No t2d; a config of which many fields are null, and RoPE's base also within rope_scaling."""
    nested = {
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    rope = {"rope_scaling": scaling | {"rope_theta": config.get("rope_theta", 10000.0)}}
    nulls = dict.fromkeys(("attention_bias", "mlp_bias", "pad_token_id", "pretraining_tp"))
    tree = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **nulls, **config, **rope}
    return tree | {"eagle_config": nested}, {name: array for name, array in weights.items() if name != "t2d"}


def _automodel(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """The target's whole configuration with some fields changed: 36 layers, windows and all."""
    of_the_target = {"model_type": "qwen3", "num_hidden_layers": 36, "layer_types": ["sliding_attention"] * 36}
    of_the_target |= {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}
    own = {"parallel_drafting": False, "fc_norm": False, "norm_output": False, "attn_implementation": "eager"}
    tree = {"architectures": ["LlamaEagle3DraftModel"], **own, **config, **of_the_target}
    return tree, {
        name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}": a for name, a in weights.items()
    }


WRITERS = {
    "eagle": _eagle,
    "specforge": _specforge,
    "sglang": _sglang,
    "vllm": _vllm,
    "speculators": _speculators,
    "model_optimizer": _model_optimizer,
    "automodel": _automodel,
}
