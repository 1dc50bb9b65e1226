"""The entries of config.json in which the architectures of GGUF files differ.

Each function takes the file's metadata and the common entries, and returns the entries that it adds or changes. They
include properties that llama.cpp derives from the architecture's name, which are not in the file.

Source: llama.cpp's convert_hf_to_gguf.py and src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jeagle.targets.gguf.metadata import Metadata

Config = dict[str, Any]
_SIGMOID = 2  # value of expert_gating_func
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}  # Gemma's own files have both


def _named(architecture: str, model_type: str) -> Config:
    return {"architectures": [f"{architecture}ForCausalLM"], "model_type": model_type}


def _llama(value: Metadata, common: Config) -> Config:
    if experts := value("expert_count", 0):
        used = value("expert_used_count")
        return _named("Mixtral", "mixtral") | {"num_local_experts": experts, "num_experts_per_tok": used}
    return _named("Llama", "llama") | {"mlp_bias": "blk.0.ffn_up.bias" in value.tensors}


def _mistral3(value: Metadata, common: Config) -> Config:
    """Ministral 3: YaRN, and queries that grow with the logarithm of their position."""
    rope = {"rope_theta": common["rope_theta"], **(common["rope_scaling"] or {"rope_type": "default"})}
    if (log_multiplier := value("rope.scaling.yarn_log_multiplier", None)) is not None:
        rope |= {"mscale": 1.0, "mscale_all_dim": log_multiplier}
    if (beta := value("attention.temperature_scale", None)) is not None:
        rope["llama_4_scaling_beta"] = beta
    return _named("Ministral3", "ministral3") | {"rope_parameters": rope}


def _experts(value: Metadata) -> Config:
    return {
        "num_experts": value("expert_count"),
        "num_experts_per_tok": value("expert_used_count"),
        "moe_intermediate_size": value("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(value: Metadata, common: Config) -> Config:
    shared = value("expert_shared_feed_forward_length")
    own = {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}
    own["qkv_bias"] = "blk.0.attn_q.bias" in value.tensors
    return _named("Qwen2Moe", "qwen2_moe") | _experts(value) | own


def _qwen3_moe(value: Metadata, common: Config) -> Config:
    return _named("Qwen3Moe", "qwen3_moe") | _experts(value) | {"norm_topk_prob": True}


def _layers(value: Metadata, common: Config, period: int) -> list[str]:
    """Which layers have a sliding window: those that the file lists, or all but every `period`-th."""
    layers, listed = common["num_hidden_layers"], value.each("attention.sliding_window_pattern", period)
    if not isinstance(listed, list):
        listed = [(i + 1) % listed != 0 for i in range(layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in listed[:layers]]


def _query_scalar(common: Config, layers_of_27b: int) -> int:
    """query_pre_attn_scalar, which files lack: the head dimension, or width over heads in the 27B model."""
    if common["num_hidden_layers"] == layers_of_27b:
        return common["hidden_size"] // common["num_attention_heads"]
    return common["head_dim"]


def _gemma2(value: Metadata, common: Config) -> Config:
    return _named("Gemma2", "gemma2") | {
        **_GELU,
        "attn_logit_softcapping": value("attn_logit_softcapping"),
        "final_logit_softcapping": value("final_logit_softcapping"),
        "sliding_window": value("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(common, 46),
        "layer_types": _layers(value, common, 2),
    }


def _two_ropes(value: Metadata, common: Config, local_theta: float) -> Config:
    """Rotary embeddings of full layers, as the file scales them, and of windowed ones, unscaled with another base."""
    scaled = common["rope_scaling"] or {"rope_type": "default"}
    local = {"rope_theta": value("rope.freq_base_swa", local_theta), "rope_type": "default"}
    return {
        "rope_parameters": {
            "full_attention": {"rope_theta": common["rope_theta"], **scaled},
            "sliding_attention": local,
        }
    }


def _gemma3(value: Metadata, common: Config) -> Config:
    return _named("Gemma3", "gemma3_text") | {
        **_GELU,
        "final_logit_softcapping": value("final_logit_softcapping", None),
        "sliding_window": value("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scalar(common, 62),
        "layer_types": _layers(value, common, 6),
        **_two_ropes(value, common, 10000.0),
    }


def _phi3(value: Metadata, common: Config) -> Config:
    original = value("rope.scaling.original_context_length", common["max_position_embeddings"])
    window = value("attention.sliding_window", 0) or None
    return _named("Phi3", "phi3") | {"sliding_window": window, "original_max_position_embeddings": original}


def _gpt_oss(value: Metadata, common: Config) -> Config:
    rope = common["rope_scaling"]
    return _named("GptOss", "gpt_oss") | {
        "rope_scaling": rope and rope | {"truncate": False},
        "num_local_experts": value("expert_count"),
        "num_experts_per_tok": value("expert_used_count"),
        "intermediate_size": value("expert_feed_forward_length"),
        "sliding_window": value("attention.sliding_window"),
        "layer_types": _layers(value, common, 2),
        "swiglu_limit": 7.0,
    }


def _routed(value: Metadata) -> Config:
    """The experts of DeepSeek and of models like it."""
    return {
        "n_routed_experts": value("expert_count"),
        "num_experts_per_tok": value("expert_used_count"),
        "n_shared_experts": value("expert_shared_count"),
        "moe_intermediate_size": value("expert_feed_forward_length"),
        "first_k_dense_replace": value("leading_dense_block_count", 0),
        "routed_scaling_factor": value("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(value("expert_weights_norm", False)),
        "n_group": value("expert_group_count", 1),
        "topk_group": value("expert_group_used_count", 1),
    }


def _deepseek2(value: Metadata, common: Config) -> Config:
    """DeepSeek V2 and V3 have one architecture in GGUF; V3 is the one that chooses experts by sigmoids."""
    rotated, rope = value("rope.dimension_count"), common["rope_scaling"]
    routed, third = _routed(value), value("expert_gating_func", 1) == _SIGMOID
    if (log_multiplier := value("rope.scaling.yarn_log_multiplier", None)) is not None and rope:
        mscale = round(10 * log_multiplier, 6)  # the converter stores a tenth of it
        rope = rope | {"mscale": mscale, "mscale_all_dim": mscale}
    attention = {
        "num_key_value_heads": common["num_attention_heads"],
        "q_lora_rank": value("attention.q_lora_rank", None),
        "kv_lora_rank": value("attention.kv_lora_rank"),
        "qk_nope_head_dim": value("attention.key_length_mla", common["head_dim"]) - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value("attention.value_length_mla", None) or value("attention.value_length"),
        "head_dim": rotated,
        "rope_scaling": rope,
    }
    if third:
        own = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        return _named("DeepseekV3", "deepseek_v3") | attention | routed | own
    method = "group_limited_greedy" if routed["n_group"] > 1 else "greedy"
    return _named("DeepseekV2", "deepseek_v2") | attention | routed | {"topk_method": method}


def _glm4_moe(value: Metadata, common: Config) -> Config:
    value("expert_gating_func", _SIGMOID)
    own = {"use_qk_norm": "blk.0.attn_q_norm.weight" in value.tensors}
    return _named("Glm4Moe", "glm4_moe") | _routed(value) | own


def _smollm3(value: Metadata, common: Config) -> Config:
    """Every fourth layer has no rotary embedding."""
    rotates = [int((i + 1) % 4 != 0) for i in range(common["num_hidden_layers"])]
    return _named("SmolLM3", "smollm3") | {"no_rope_layers": rotates, "no_rope_layer_interval": 4}


def _olmo2(value: Metadata, common: Config) -> Config:
    """OLMo 2, or OLMo 3 if there is a sliding window."""
    if not (window := value("attention.sliding_window", 0)):
        return _named("Olmo2", "olmo2")
    ropes = _two_ropes(value, common, common["rope_theta"])
    return _named("Olmo3", "olmo3") | {"sliding_window": window, "layer_types": _layers(value, common, 4), **ropes}


def _granite(value: Metadata, common: Config) -> Config:
    return _named("Granite", "granite") | {
        "attention_multiplier": value("attention.scale", 1.0),
        "embedding_multiplier": value("embedding_scale", 1.0),
        "residual_multiplier": value("residual_scale", 1.0),
        "logits_scaling": value("logit_scale", 1.0),
        "mlp_bias": False,
    }


FAMILIES: dict[str, Callable[[Metadata, Config], Config]] = {
    "deepseek2": _deepseek2,
    "gemma": lambda value, common: _named("Gemma", "gemma") | _GELU,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "glm4": lambda value, common: _named("Glm4", "glm4"),
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "llama": _llama,
    "mistral3": _mistral3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": lambda value, common: _named("Qwen2", "qwen2"),
    "qwen2moe": _qwen2_moe,
    "qwen3": lambda value, common: _named("Qwen3", "qwen3"),
    "qwen3moe": _qwen3_moe,
    "smollm3": _smollm3,
}
