"""A GGUF file's metadata as Hugging Face's configuration of the same model.

The functions in `FAMILIES` take the metadata and the entries that all architectures have in common, and return the
entries that they add or change. They include properties that llama.cpp derives from the architecture's name, which are
not in the file. They replace the entry "architectures" where it does not follow from the file's architecture alone.

Source: llama.cpp's convert_hf_to_gguf.py and src/models/*.cpp.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.interfaces import Rope
from jeagle.layers.rope import attention_factor, inverse_frequencies
from jeagle.targets.families import family_of
from jeagle.targets.gguf.reader import GgufFile, Metadata

Config = dict[str, Any]
_SIGMOID = 2  # value of expert_gating_func
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}  # Gemma's own files have both
# These models have no attention_bias in config.json. Qwen 2 always has biases of q, k and v.
_NO_BIAS_SWITCH = {"mistral3", "phi3", "qwen2", "qwen2moe"}

# Llama 3's own scaling. The file has only the divisors that follow from it, which are compared with it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}


def read_config(opened: GgufFile) -> Config:
    """Returns config.json of a GGUF.

    Raises:
      UserError: for an architecture or a metadata key that is not supported, or for a key or tensor that is missing.
    """
    value = Metadata(opened)
    if value.architecture not in FAMILIES:
        raise UserError(
            f"The target {opened.path} is a GGUF of the architecture {value.architecture}; supported in GGUF: "
            f"{', '.join(sorted(FAMILIES))}. Give the model's safetensors folder instead."
        )
    name, own = FAMILIES[value.architecture]
    common: Config = {"architectures": [f"{name}ForCausalLM"]} | _common(value)
    config = common | own(value, common)
    config["model_type"] = family_of(config).model_type
    value.refuse_unread()
    replaced = ("rope_theta", "rope_scaling") if "rope_parameters" in config else ()
    return {name: entry for name, entry in config.items() if name not in replaced}


def _common(value: Metadata) -> Config:
    """The entries that every architecture has in the same form."""
    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    rotated = value("rope.dimension_count", head_dim)
    partial = rotated != head_dim and value("attention.kv_lora_rank", None) is None
    # The ids of end of text and, where the file distinguishes them, of end of turn and of end of message.
    ends = [value.header.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(i for i in ends if i is not None))
    return {
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length", None),
        # block_count includes the layers for multi-token prediction
        "num_hidden_layers": value("block_count") - value("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": value.rows("token_embd.weight"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(value, rotated),
        "tie_word_embeddings": "output.weight" not in value.tensors,
        "max_position_embeddings": value("context_length"),
        "bos_token_id": value.header.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": unique if len(unique) > 1 else (unique or [None])[0],
        "hidden_act": "silu",
        **({} if value.architecture in _NO_BIAS_SWITCH else {"attention_bias": "blk.0.attn_q.bias" in value.tensors}),
        **({"partial_rotary_factor": rotated / head_dim} if partial else {}),
    }


def rope_scaling(value: Metadata, rotated: int) -> Config | None:
    """Returns `rope_scaling` of config.json; None = no scaling.

    Args:
      rotated: number of a head's dimensions that are rotated.

    Raises:
      UserError: for a kind of scaling that is not supported.
    """
    if "rope_freqs.weight" in value.tensors:
        return _llama3(value, rotated)
    if "rope_factors_long.weight" in value.tensors:
        return _longrope(value)
    kind, factor = value("rope.scaling.type", "none"), value("rope.scaling.factor", None)
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = value("rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        options = {name: value(f"rope.scaling.{key}", None) for name, key in _YARN.items()}
        return scaling | {name: option for name, option in options.items() if option is not None}
    raise UserError(f"The target {value.path} has the RoPE scaling {kind!r}, which is not supported in GGUF.")


def _llama3(value: Metadata, rotated: int) -> Config:
    """The scaling that gives the file's divisors of each pair's frequency; UserError if Llama 3's does not."""
    divisors = np.asarray(value.vector("rope_freqs.weight"))
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    theta = value("rope.freq_base", 10000.0)
    scaled = inverse_frequencies(Rope(theta, tuple(scaling.items())), rotated)
    expected = inverse_frequencies(Rope(theta), rotated) / scaled
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(
            f"The target {value.path} divides its rotary frequencies (rope_freqs.weight) in another way than Llama "
            "3, which is not supported in GGUF: give the model's safetensors folder instead."
        )
    return scaling


def _longrope(value: Metadata) -> Config:
    """Phi's two sets of divisors, and the attention factor where it does not follow from the lengths."""
    value("rope.scaling.type", None)
    value("rope.scaling.factor", None)
    longest, original = value("context_length"), value("rope.scaling.original_context_length")
    scaling = {
        "rope_type": "longrope",
        "short_factor": value.vector("rope_factors_short.weight"),
        "long_factor": value.vector("rope_factors_long.weight"),
    }
    lengths = {"factor": longest / original, "original_max_position_embeddings": original}
    usual = attention_factor(Rope(value("rope.freq_base", 10000.0), tuple((scaling | lengths).items())))
    stated = value("rope.scaling.attn_factor", usual)
    return scaling if math.isclose(stated, usual, rel_tol=1e-4) else scaling | {"attention_factor": stated}


def _llama_or_mixtral(value: Metadata, common: Config) -> Config:
    """Llama, or Mixtral if there are experts."""
    if experts := value("expert_count", 0):
        own = {"num_local_experts": experts, "num_experts_per_tok": value("expert_used_count")}
        return own | {"architectures": ["MixtralForCausalLM"]}
    return {"mlp_bias": "blk.0.ffn_up.bias" in value.tensors}


def _mistral3(value: Metadata, common: Config) -> Config:
    """Ministral 3: YaRN, and queries that grow with the logarithm of their position."""
    rope = {"rope_theta": common["rope_theta"], **(common["rope_scaling"] or {"rope_type": "default"})}
    if (log_multiplier := value("rope.scaling.yarn_log_multiplier", None)) is not None:
        rope |= {"mscale": 1.0, "mscale_all_dim": log_multiplier}
    if (beta := value("attention.temperature_scale", None)) is not None:
        rope["llama_4_scaling_beta"] = beta
    return {"rope_parameters": rope}


def _experts(value: Metadata) -> Config:
    return {
        "num_experts": value("expert_count"),
        "num_experts_per_tok": value("expert_used_count"),
        "moe_intermediate_size": value("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(value: Metadata, common: Config) -> Config:
    shared, bias = value("expert_shared_feed_forward_length"), "blk.0.attn_q.bias" in value.tensors
    return _experts(value) | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False, "qkv_bias": bias}


def _layers(value: Metadata, common: Config, period: int) -> list[str]:
    """Which layers have a sliding window: those that the file lists, or all but every `period`-th."""
    layers, listed = common["num_hidden_layers"], value.each("attention.sliding_window_pattern", period)
    if not isinstance(listed, list):
        listed = [(i + 1) % listed != 0 for i in range(layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in listed[:layers]]


def _gemma2(value: Metadata, common: Config) -> Config:
    caps = {name: value(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    window = value("attention.sliding_window", 4096)
    return caps | _windowed_gemma(common, 46) | {"sliding_window": window, "layer_types": _layers(value, common, 2)}


def _windowed_gemma(common: Config, layers_of_27b: int) -> Config:
    """Gemma's entries that files lack; query_pre_attn_scalar is the head dimension, and width over heads in 27B."""
    is_27b = common["num_hidden_layers"] == layers_of_27b
    scalar = common["hidden_size"] // common["num_attention_heads"] if is_27b else common["head_dim"]
    return _GELU | {"query_pre_attn_scalar": scalar}


def _two_ropes(value: Metadata, common: Config, local_theta: float) -> Config:
    """Rotary embeddings of full layers, as the file scales them, and of windowed ones, unscaled with another base."""
    scaled = common["rope_scaling"] or {"rope_type": "default"}
    local = {"rope_theta": value("rope.freq_base_swa", local_theta), "rope_type": "default"}
    full = {"rope_theta": common["rope_theta"], **scaled}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _gemma3(value: Metadata, common: Config) -> Config:
    own = _windowed_gemma(common, 62) | _two_ropes(value, common, 10000.0)
    own |= {"sliding_window": value("attention.sliding_window"), "layer_types": _layers(value, common, 6)}
    return own | {"final_logit_softcapping": value("final_logit_softcapping", None)}


def _phi3(value: Metadata, common: Config) -> Config:
    original = value("rope.scaling.original_context_length", common["max_position_embeddings"])
    window = value("attention.sliding_window", 0) or None
    return {"sliding_window": window, "original_max_position_embeddings": original}


def _gpt_oss(value: Metadata, common: Config) -> Config:
    rope = common["rope_scaling"]
    return {
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
    own: Config
    if third:
        own = {"architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    else:
        own = {"topk_method": "group_limited_greedy" if routed["n_group"] > 1 else "greedy"}
    return attention | routed | own


def _glm4_moe(value: Metadata, common: Config) -> Config:
    value("expert_gating_func", _SIGMOID)
    return _routed(value) | {"use_qk_norm": "blk.0.attn_q_norm.weight" in value.tensors}


def _smollm3(value: Metadata, common: Config) -> Config:
    """Every fourth layer has no rotary embedding."""
    rotates = [int((i + 1) % 4 != 0) for i in range(common["num_hidden_layers"])]
    return {"no_rope_layers": rotates, "no_rope_layer_interval": 4}


def _olmo2(value: Metadata, common: Config) -> Config:
    """OLMo 2, or OLMo 3 if there is a sliding window."""
    if not (window := value("attention.sliding_window", 0)):
        return {}
    own = {"architectures": ["Olmo3ForCausalLM"], "sliding_window": window}
    return own | {"layer_types": _layers(value, common, 4)} | _two_ropes(value, common, common["rope_theta"])


def _granite(value: Metadata, common: Config) -> Config:
    return {
        "attention_multiplier": value("attention.scale", 1.0),
        "embedding_multiplier": value("embedding_scale", 1.0),
        "residual_multiplier": value("residual_scale", 1.0),
        "logits_scaling": value("logit_scale", 1.0),
        "mlp_bias": False,
    }


# By the file's architecture: the name in Hugging Face's config.json without "ForCausalLM", and the entries.
FAMILIES: dict[str, tuple[str, Callable[[Metadata, Config], Config]]] = {
    "deepseek2": ("DeepseekV2", _deepseek2),
    "gemma": ("Gemma", lambda value, common: _GELU),
    "gemma2": ("Gemma2", _gemma2),
    "gemma3": ("Gemma3", _gemma3),
    "glm4": ("Glm4", lambda value, common: {}),
    "glm4moe": ("Glm4Moe", _glm4_moe),
    "gpt-oss": ("GptOss", _gpt_oss),
    "granite": ("Granite", _granite),
    "llama": ("Llama", _llama_or_mixtral),
    "mistral3": ("Ministral3", _mistral3),
    "olmo2": ("Olmo2", _olmo2),
    "phi3": ("Phi3", _phi3),
    "qwen2": ("Qwen2", lambda value, common: {}),
    "qwen2moe": ("Qwen2Moe", _qwen2_moe),
    "qwen3": ("Qwen3", lambda value, common: {}),
    "qwen3moe": ("Qwen3Moe", lambda value, common: _experts(value) | {"norm_topk_prob": True}),
    "smollm3": ("SmolLM3", _smollm3),
}
