"""A GGUF file's metadata as the configuration that Hugging Face would have written for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jeagle.errors import UserError
from jeagle.targets.gguf.families import FAMILIES
from jeagle.targets.gguf.metadata import Metadata
from jeagle.targets.gguf.reader import Gguf
from jeagle.targets.gguf.rope import rope_scaling

# Their config.json has no attention_bias: where Qwen 2 has biases, they are on q, k and v alone, always.
_NO_BIAS_SWITCH = {"mistral3", "phi3", "qwen2", "qwen2moe"}


def read_config(opened: Gguf) -> dict[str, Any]:
    """config.json of a GGUF.

    Raises:
      UserError: for an architecture or a switch that is not supported, or a key or tensor that is missing.
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
    """What every architecture says in the same words."""
    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    rotated = value("rope.dimension_count", head_dim)
    partly = rotated != head_dim and value("attention.kv_lora_rank", None) is None
    return {
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length", None),
        # the file counts the layers that only predict further tokens
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
        "eos_token_id": _ends(value.header),
        "hidden_act": "silu",
        **({} if value.architecture in _NO_BIAS_SWITCH else {"attention_bias": "blk.0.attn_q.bias" in value.tensors}),
        **({"partial_rotary_factor": rotated / head_dim} if partly else {}),
    }


def _ends(header: Mapping[str, Any]) -> int | list[int] | None:
    """End of text and, where the file tells them apart, end of turn and of message."""
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(header[key] for key in keys if key in header))
    return ids if len(ids) > 1 else (ids or [None])[0]
