"""Literal tables: published targets as their config.json gives them, slices to compile them for, and chips."""

from __future__ import annotations

import dataclasses
from typing import Any

# The switches of config.json that its numbers follow from, as published on Hugging Face.
_LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "llama-3.3-70b": _LLAMA_3_1_8B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt-oss-120b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A target on a slice: `rows` x `length` tokens in a batch, mesh axes as on the command line."""

    target: str
    topology: str
    rows: int
    length: int
    mesh: str


CASES = (
    Case("llama-3.1-8b", "v5e:2x4", 8, 2048, "fsdp=8"),
    Case("llama-3.3-70b", "v5p:4x4x2", 32, 2048, "fsdp=32"),
    Case("qwen3-30b-a3b", "v6e:2x4", 16, 2048, "fsdp=8"),
    Case("gpt-oss-120b", "v5p:4x4x2", 32, 2048, "fsdp=8,expert=4"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      flops: bfloat16 FLOP/s. memory: bytes of HBM. bandwidth: of HBM, bytes/s. links: of all inter-chip links, bytes/s.
      clock: Hz, from the FLOP/s and the number of multiply-adds per cycle.

    Source: cloud.google.com/tpu/docs, system architecture.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    clock: float


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 0.819e12, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 600e9, 1.75e9),
    "v6e": Chip(918e12, 32 * 2**30, 1.640e12, 448e9, 1.75e9),
}
