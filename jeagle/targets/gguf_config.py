"""A GGUF file's metadata as the configuration that Hugging Face would have written for the same model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.errors import UserError

# general.architecture -> Hugging Face's architecture.
ARCHITECTURES = {"llama": "LlamaForCausalLM"}
# Llama 3's own RoPE scaling: the file keeps only the divisors that follow from it, so these are checked against them.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a GGUF.

    Args:
      path: the file, for messages.
      metadata: key -> value of its header.
      tensors: GGUF name -> tensor (gguf.ReaderTensor).

    Raises:
      UserError: for an architecture or a variant of it that is not supported, or a key or tensor that is missing.
    """
    value = _Values(path, metadata)
    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    rotated = value("rope.dimension_count", head_dim)
    return {
        "architectures": [ARCHITECTURES[value.architecture]],
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _rows(path, tensors, "token_embd.weight"),
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(value("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(path, value, tensors, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": value("context_length"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        **({} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}),
    }


class _Values:
    """Metadata under the architecture's own prefix, of an architecture that is supported."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path, self.metadata = path, metadata
        self.architecture = str(metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"The target {path} is a GGUF of the architecture {self.architecture}; supported in GGUF: "
                f"{', '.join(sorted(ARCHITECTURES))}. Give the model's safetensors folder instead."
            )
        if self("expert_count", 0):
            raise UserError(f"The target {path} is a mixture of experts, which is not supported in GGUF.")

    def __call__(self, key: str, default: Any = None) -> Any:
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise UserError(f"The target {self.path} lacks the metadata {self.architecture}.{key}: convert it again.")
        if isinstance(found, list):
            raise UserError(f"The target {self.path} has another {key} in each layer, which is not supported.")
        return found


def _rows(path: Path, tensors: Mapping[str, Any], name: str) -> int:
    if name not in tensors:
        raise UserError(f"The target {path} has no tensor {name}: is its download complete?")
    return int(tensors[name].shape[-1])


def _shortest(value: float) -> float:
    """The decimal that was stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _ends(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """End of text and, where the file tells them apart, end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = list(dict.fromkeys(metadata[key] for key in keys if key in metadata))
    return ids if len(ids) > 1 else (ids or [None])[0]


def _rope_scaling(path: Path, value: Any, tensors: Mapping[str, Any], head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        return _llama3_rope(path, value, np.asarray(tensors["rope_freqs.weight"].data, np.float64), head_dim)
    kind = value("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest(value("rope.scaling.factor"))}
    raise UserError(f"The target {path} has the RoPE scaling {kind!r}, which is not supported in GGUF.")


def _llama3_rope(path: Path, value: Any, divisors: np.ndarray, head_dim: int) -> dict[str, Any]:
    """The scaling that gives the file's divisors of each pair's frequency."""
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3_ROPE}
    low, high, original = _LLAMA3_ROPE.values()
    base = value("rope.freq_base", 10000.0)
    wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / scaling["factor"] + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(
            f"The target {path} divides its rotary frequencies (rope_freqs.weight) otherwise than Llama 3, which is "
            "not supported in GGUF: give the model's safetensors folder instead."
        )
    return scaling
