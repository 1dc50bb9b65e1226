"""A GGUF file's metadata as Hugging Face's configuration of the same model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.interfaces import Rope
from jeagle.layers.rope import attention_factor, inverse_frequencies
from jeagle.targets.gguf.families import FAMILIES
from jeagle.targets.gguf.metadata import Metadata
from jeagle.targets.gguf.reader import GgufFile

# These models have no attention_bias in config.json. Qwen 2 always has biases of q, k and v.
_NO_BIAS_SWITCH = {"mistral3", "phi3", "qwen2", "qwen2moe"}

# Llama 3's own scaling. The file has only the divisors that follow from it, which are compared with it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}


def read_config(opened: GgufFile) -> dict[str, Any]:
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
    common = _common(value)
    config = common | FAMILIES[value.architecture](value, common)
    value.refuse_unread()
    replaced = ("rope_theta", "rope_scaling") if "rope_parameters" in config else ()
    return {name: entry for name, entry in config.items() if name not in replaced}


def _common(value: Metadata) -> dict[str, Any]:
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


def rope_scaling(value: Metadata, rotated: int) -> dict[str, Any] | None:
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


def _llama3(value: Metadata, rotated: int) -> dict[str, Any]:
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


def _longrope(value: Metadata) -> dict[str, Any]:
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
