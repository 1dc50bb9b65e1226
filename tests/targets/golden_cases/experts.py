"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, DeepSeek V2 and V3, Llama 4, GLM-4-MoE."""

from __future__ import annotations

from tests.targets.golden_cases.case import EXPERT, FULL, LLAMA, LLAMA3, SLIDING, YARN, Case, pattern, rope

_QWEN2_MOE = {
    "rope_parameters": rope(),
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": lambda s: s.hidden // 2,
    **EXPERT,
}
_QWEN3_MOE = {"rope_parameters": rope(), "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, **EXPERT}
_GPT_OSS = {
    "intermediate_size": lambda s: s.hidden,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 1.5,
    "rope_parameters": rope("yarn", truncate=False, **YARN),
}
_GPT_OSS_PUBLISHED = _GPT_OSS | {
    "rope_parameters": None,
    "rope_theta": 1000.0,
    "rope_scaling": {"rope_type": "yarn", "truncate": False, **YARN},
    "layer_types": pattern(SLIDING, FULL),
    "attention_bias": True,
    "hidden_act": "silu",
    "initial_context_length": 12,
    "experts_per_token": 2,
    "tie_word_embeddings": False,
    "swiglu_limit": 1.5,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    **EXPERT,
}
_V2 = _MLA | {"topk_method": "group_limited_greedy", "rope_parameters": rope()}
_V3 = _MLA | {"norm_topk_prob": True, "rope_parameters": rope()}
_DEEPSEEK_YARN = {"rope_theta": 1000.0, "rope_parameters": None}
_MTP = tuple(f"model.layers.{{L}}.{name}.weight" for name in ("eh_proj", "enorm", "self_attn.o_proj"))
_LLAMA4 = {
    "rope_parameters": rope(),
    "head_dim": 8,
    "intermediate_size": lambda s: s.hidden // 4,
    "intermediate_size_mlp": lambda s: s.hidden,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 7,
    "no_rope_layer_interval": 3,
    "floor_scale": 4,
    "attn_scale": 0.4,
}
_LLAMA4_VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vision_output_dim": 8,
    "image_size": 8,
    "patch_size": 4,
    "projector_input_dim": 8,
    "projector_output_dim": 8,
}
_GLM4_MOE = {
    "rope_parameters": rope(partial_rotary_factor=0.25),
    "head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    **EXPERT,
}

EXPERTS: dict[str, Case] = {
    "mixtral": Case("MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "intermediate_size": 16}),
    "mixtral_sliding": Case(
        "MixtralForCausalLM",
        {
            "rope_theta": 1000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 8,
            "sliding_window": 6,
        },
        published=True,
    ),
    "qwen2_moe": Case("Qwen2MoeForCausalLM", _QWEN2_MOE, layers=3),
    "qwen2_moe_sparse": Case(
        "Qwen2MoeForCausalLM",
        _QWEN2_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [3], "qkv_bias": False},
        layers=4,
    ),
    "qwen2_moe_sliding": Case(
        "Qwen2MoeForCausalLM",
        _QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "norm_topk_prob": True},
        layers=3,
    ),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", _QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe_sparse": Case(
        "Qwen3MoeForCausalLM",
        _QWEN3_MOE
        | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
        layers=4,
    ),
    "gpt_oss": Case("GptOssForCausalLM", _GPT_OSS),
    "gpt_oss_mxfp4": Case("GptOssForCausalLM", _GPT_OSS_PUBLISHED, published=True, stored="mxfp4"),
    "deepseek_v2": Case("DeepseekV2ForCausalLM", _V2, layers=3),
    "deepseek_v2_lite": Case(
        "DeepseekV2ForCausalLM",
        _V2
        | _DEEPSEEK_YARN
        | {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "rope_scaling": {"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707, **YARN},
        },
        published=True,
    ),
    "deepseek_v2_mscale": Case(
        "DeepseekV2ForCausalLM",
        _V2
        | _DEEPSEEK_YARN
        | {"attention_bias": True, "rope_scaling": {"type": "yarn", "mscale": 2.0, "mscale_all_dim": 0.5, **YARN}},
        published=True,
    ),
    "deepseek_v3_published": Case(
        "DeepseekV3ForCausalLM",
        _V3
        | _DEEPSEEK_YARN
        | {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 1,
            "rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **YARN},
        },
        published=True,
        extra=_MTP,
        layers=3,
    ),
    "deepseek_v3_plain": Case(
        "DeepseekV3ForCausalLM",
        _V3 | {"q_lora_rank": None, "norm_topk_prob": False, "rope_interleave": False, "attention_bias": True},
    ),
    "deepseek_v3_fp8": Case(
        "DeepseekV3ForCausalLM",
        _V3 | {"rope_parameters": None, "rope_theta": 1000.0, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        published=True,
        stored="fp8_block",
    ),
    "llama4": Case("Llama4ForCausalLM", _LLAMA4, layers=3),
    "llama4_every_moe": Case(
        "Llama4ForCausalLM",
        _LLAMA4
        | {
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "interleave_moe_layer_step": 1,
            "num_experts_per_tok": 2,
            "attention_bias": True,
        },
    ),
    "llama4_multimodal": Case(
        "Llama4ForConditionalGeneration",
        {"vision_config": _LLAMA4_VISION},
        layers=4,
        published=True,
        text=_LLAMA4
        | {
            "model_type": "llama4_text",
            "rope_parameters": None,
            "rope_theta": 1000.0,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            "no_rope_layers": [],
            "no_rope_layer_interval": 4,
        },
    ),
    "glm4_moe": Case("Glm4MoeForCausalLM", _GLM4_MOE | {"use_qk_norm": True}, layers=3),
    "glm4_moe_published": Case(
        "Glm4MoeForCausalLM",
        _GLM4_MOE
        | {
            "rope_parameters": None,
            "rope_theta": 1000.0,
            "use_qk_norm": False,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "num_nextn_predict_layers": 1,
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
        },
        published=True,
        extra=_MTP,
    ),
}
