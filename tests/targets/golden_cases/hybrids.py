"""Hybrids of gated delta rule and attention: Qwen3-Next, and Qwen3.5 dense and with experts."""

from __future__ import annotations

from tests.targets.golden_cases.case import EXPERT, FULL, LINEAR, Case, ending, rope

_DELTA = {
    "head_dim": 16,
    "layer_types": ending(FULL, LINEAR, LINEAR, FULL),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
_SHARED = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": lambda s: s.hidden // 4,
    **EXPERT,
}
_MROPE = {
    "rope_parameters": rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
}
_NEXT = _DELTA | _SHARED | {"rope_parameters": rope(partial_rotary_factor=0.5)}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": lambda s: s.hidden,
    "num_position_embeddings": 16,
}

HYBRIDS: dict[str, Case] = {
    "qwen3_next": Case("Qwen3NextForCausalLM", _NEXT, layers=3),
    "qwen3_next_long": Case(
        "Qwen3NextForCausalLM",
        _NEXT
        | {
            "rope_parameters": None,
            "rope_theta": 1000.0,
            "layer_types": None,
            "full_attention_interval": 2,
            "linear_conv_kernel_dim": 4,
            "norm_topk_prob": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
        },
        tokens=68,
        published=True,
        extra=("mtp.fc.weight", "mtp.norm.weight"),
    ),
    "qwen3_next_sparse": Case("Qwen3NextForCausalLM", _NEXT | {"mlp_only_layers": [0]}),
    "qwen3_5": Case("Qwen3_5ForCausalLM", _DELTA | _MROPE, layers=3),
    "qwen3_5_long": Case("Qwen3_5ForCausalLM", _DELTA | _MROPE | {"tie_word_embeddings": True}, tokens=68),
    "qwen3_5_moe": Case("Qwen3_5MoeForCausalLM", _DELTA | _SHARED | _MROPE, layers=3),
    "qwen3_5_multimodal": Case(
        "Qwen3_5ForConditionalGeneration",
        {"vision_config": _QWEN_VISION | {"model_type": "qwen3_5"}},
        published=True,
        text=_DELTA | _MROPE | {"model_type": "qwen3_5_text"},
        extra=("mtp.fc.weight", "mtp.norm.weight"),
    ),
    "qwen3_5_moe_multimodal": Case(
        "Qwen3_5MoeForConditionalGeneration",
        {"vision_config": _QWEN_VISION | {"model_type": "qwen3_5_moe"}},
        published=True,
        text=_DELTA | _SHARED | _MROPE | {"model_type": "qwen3_5_moe_text"},
        stored="fused_experts",
    ),
}
