"""Gemma 1, 2, 3 and 4."""

from __future__ import annotations

from tests.targets.golden_cases.case import EXPERT, FULL, SIGLIP, SLIDING, Case, ending, pattern, rope

_GEMMA = {"rope_parameters": rope(), "head_dim": 16, "num_key_value_heads": 1}
_GEMMA2 = {
    "rope_parameters": rope(),
    "head_dim": 16,
    "sliding_window": 6,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
_GEMMA3 = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}
_GEMMA3_ROPE = {SLIDING: rope(theta=100.0), FULL: rope("linear", 1000.0, factor=4.0)}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 24,
    "sliding_window": 6,
    "final_logit_softcapping": 3.0,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        SLIDING: rope(theta=100.0),
        FULL: rope("proportional", 1000.0, partial_rotary_factor=0.5),
    },
}
_GEMMA4_INPUTS = _GEMMA4 | {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 48,
    "layer_types": ending(FULL, SLIDING, FULL),
}
_GEMMA4_MOE = _GEMMA4 | {
    "layer_types": ending(FULL, SLIDING, FULL),
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    **EXPERT,
}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "patch_size": 2,
    "position_embedding_size": 16,
}

GEMMA: dict[str, Case] = {
    "gemma": Case("GemmaForCausalLM", _GEMMA),
    "gemma_published": Case(
        "GemmaForCausalLM", {"rope_theta": 1000.0, "head_dim": 8, "hidden_act": "gelu"}, published=True
    ),
    "gemma2": Case("Gemma2ForCausalLM", _GEMMA2, layers=3),
    "gemma2_published": Case(
        "Gemma2ForCausalLM", _GEMMA2 | {"rope_parameters": None, "rope_theta": 1000.0}, published=True
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM", _GEMMA3 | {"layer_types": pattern(SLIDING, FULL), "rope_parameters": _GEMMA3_ROPE}, 3
    ),
    "gemma3_published": Case(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {
            "sliding_window_pattern": 2,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        layers=3,
        published=True,
    ),
    "gemma3_softcap": Case(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {
            "layer_types": pattern(FULL, SLIDING),
            "rope_parameters": _GEMMA3_ROPE,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_multimodal": Case(
        "Gemma3ForConditionalGeneration",
        {"vision_config": SIGLIP | {"vision_use_head": False}, "mm_tokens_per_image": 4},
        published=True,
        text=_GEMMA3 | {"model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_theta": 1000.0},
    ),
    "gemma4": Case("Gemma4ForCausalLM", _GEMMA4 | {"layer_types": ending(FULL, SLIDING, FULL)}, layers=3),
    "gemma4_per_layer_inputs": Case("Gemma4ForCausalLM", _GEMMA4_INPUTS),
    "gemma4_shared_kv": Case(
        "Gemma4ForCausalLM",
        _GEMMA4_INPUTS
        | {
            "layer_types": ending(FULL, SLIDING, FULL),
            "num_kv_shared_layers": lambda s: s.layers - 2,
            "use_double_wide_mlp": True,
        },
        layers=5,
    ),
    "gemma4_k_eq_v": Case(
        "Gemma4ForCausalLM",
        _GEMMA4
        | {
            "layer_types": ending(FULL, SLIDING, FULL),
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "attention_bias": True,
        },
    ),
    "gemma4_moe": Case("Gemma4ForCausalLM", _GEMMA4_MOE),
    "gemma4_multimodal": Case(
        "Gemma4ForConditionalGeneration",
        {"vision_config": _GEMMA4_VISION, "audio_config": None},
        published=True,
        text=_GEMMA4_INPUTS
        | {"model_type": "gemma4_text", "num_kv_shared_layers": lambda s: s.layers - 2, "pad_token_id": 0},
        layers=3,
    ),
}
