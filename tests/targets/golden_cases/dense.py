"""Dense decoders: Llama, Mistral, Qwen2, Qwen3, Phi-3 and 4, GLM-4, SmolLM3, OLMo 2 and 3, Ministral, Granite."""

from __future__ import annotations

from tests.targets.golden_cases.case import FULL, LLAMA, LLAMA3, SIGLIP, SLIDING, YARN, Case, factors, pattern, rope

LONG = {"short_factor": factors(1.0, 0.25), "long_factor": factors(1.5, 2.5)}
LONG_PART = {"short_factor": factors(1.0, 0.25, 0.75), "long_factor": factors(1.5, 2.5, 0.75)}
_PHI3 = {"rope_theta": 1000.0, "sliding_window": None, "original_max_position_embeddings": 12}
_MISTRAL3 = {"type": "yarn", "rope_theta": 1000.0, "llama_4_scaling_beta": 0.4, "mscale": 1.0, "mscale_all_dim": 1.0}
_MINISTRAL3 = {"head_dim": 16, "rope_parameters": _MISTRAL3 | YARN}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "rope_parameters": rope(),
}
_PIXTRAL = SIGLIP | {"model_type": "pixtral", "head_dim": 4}

DENSE: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM", LLAMA, layers=3),
    "llama_published": Case(
        "LlamaForCausalLM", {"rope_theta": 1000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, published=True
    ),
    "llama_rope_llama3": Case("LlamaForCausalLM", {"rope_parameters": rope("llama3", **LLAMA3)}),
    "llama_rope_linear_published": Case(
        "LlamaForCausalLM", {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 3.0}}, published=True
    ),
    "llama_rope_dynamic": Case(
        "LlamaForCausalLM", {"rope_parameters": rope("dynamic", factor=3.0), "max_position_embeddings": 12}, layers=2
    ),
    "llama_rope_yarn": Case("LlamaForCausalLM", {"rope_parameters": rope("yarn", **YARN)}),
    "llama_rope_yarn_attention_factor": Case(
        "LlamaForCausalLM", {"rope_parameters": rope("yarn", attention_factor=0.7, truncate=False, **YARN)}, layers=2
    ),
    "llama_biases": Case("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": Case("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama_head_dim_gelu": Case(
        "LlamaForCausalLM", LLAMA | {"head_dim": 12, "num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}
    ),
    "mistral": Case("MistralForCausalLM", LLAMA | {"sliding_window": 6}),
    "mistral_head_dim": Case(
        "MistralForCausalLM", {"rope_theta": 1000.0, "head_dim": 12, "sliding_window": None}, published=True
    ),
    "qwen2": Case("Qwen2ForCausalLM", LLAMA),
    "qwen2_sliding": Case(
        "Qwen2ForCausalLM",
        {"rope_theta": 1000.0, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        published=True,
    ),
    "qwen2_sliding_off": Case(
        "Qwen2ForCausalLM",
        {"rope_theta": 1000.0, "use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1},
        published=True,
    ),
    "qwen2_yarn_tied": Case(
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": True, "rope_theta": 1000.0, "rope_scaling": {"type": "yarn", **YARN}},
        published=True,
    ),
    "qwen3": Case("Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    "qwen3_published": Case(
        "Qwen3ForCausalLM",
        {
            "rope_theta": 1000.0,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
        published=True,
    ),
    "qwen3_fp8": Case(
        "Qwen3ForCausalLM", {"rope_theta": 1000.0, "head_dim": 16}, published=True, stored="fp8_block_bfloat16"
    ),
    "phi3": Case("Phi3ForCausalLM", LLAMA | {"sliding_window": 6}, layers=3),
    "phi3_longrope_long": Case(
        "Phi3ForCausalLM", _PHI3 | {"rope_scaling": {"type": "longrope", **LONG}}, published=True
    ),
    "phi3_longrope_short": Case(
        "Phi3ForCausalLM",
        _PHI3 | {"original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope", **LONG}},
        published=True,
    ),
    "phi4_partial_long": Case(
        "Phi3ForCausalLM",
        _PHI3
        | {
            "rope_scaling": {"type": "longrope", **LONG_PART},
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "sliding_window": 7,
        },
        published=True,
    ),
    "phi4_partial_short": Case(
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": rope("longrope", partial_rotary_factor=0.75, **LONG_PART),
            "tie_word_embeddings": True,
        },
    ),
    "phi4_partial": Case("Phi3ForCausalLM", {"rope_parameters": rope(partial_rotary_factor=0.75)}),
    "glm": Case("GlmForCausalLM", {"rope_parameters": rope(partial_rotary_factor=0.25), "head_dim": 16}),
    "glm_published": Case(
        "GlmForCausalLM", {"rope_theta": 1000.0, "head_dim": 8, "attention_bias": False}, published=True
    ),
    "glm4": Case("Glm4ForCausalLM", {"rope_parameters": rope(partial_rotary_factor=0.25), "head_dim": 16}),
    "glm4_published": Case(
        "Glm4ForCausalLM", {"rope_theta": 1000.0, "head_dim": 8, "attention_bias": False}, published=True
    ),
    "smollm3": Case("SmolLM3ForCausalLM", LLAMA | {"no_rope_layer_interval": 3}, layers=3),
    "smollm3_sliding": Case(
        "SmolLM3ForCausalLM",
        {
            "rope_theta": 1000.0,
            "no_rope_layers": pattern(1, 0),
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
        published=True,
    ),
    "olmo2": Case("Olmo2ForCausalLM", LLAMA),
    "olmo2_published": Case(
        "Olmo2ForCausalLM",
        {"rope_theta": 1000.0, "num_key_value_heads": 4, "attention_bias": True},
        published=True,
    ),
    "olmo3": Case(
        "Olmo3ForCausalLM",
        {"sliding_window": 6, "rope_parameters": {SLIDING: rope(), FULL: rope("yarn", **YARN)}},
        layers=4,
    ),
    "olmo3_published": Case(
        "Olmo3ForCausalLM",
        {
            "sliding_window": 6,
            "rope_theta": 1000.0,
            "rope_scaling": {"rope_type": "yarn", "attention_factor": 1.2, **YARN},
            "layer_types": pattern(SLIDING, FULL),
        },
        published=True,
    ),
    "ministral": Case(
        "MinistralForCausalLM", LLAMA | {"head_dim": 8, "sliding_window": 6, "layer_types": pattern(SLIDING, FULL)}
    ),
    "ministral3": Case("Ministral3ForCausalLM", _MINISTRAL3),
    "ministral3_multimodal": Case(
        "Mistral3ForConditionalGeneration",
        {"vision_config": _PIXTRAL, "tie_word_embeddings": True},
        published=True,
        text=_MINISTRAL3 | {"model_type": "ministral3", "tie_word_embeddings": True},
    ),
    "ministral3_fp8": Case(
        "Mistral3ForConditionalGeneration",
        {"vision_config": _PIXTRAL, "tie_word_embeddings": False},
        published=True,
        text=_MINISTRAL3 | {"model_type": "ministral3", "tie_word_embeddings": False},
        stored="fp8_tensor",
    ),
    "mistral3_multimodal": Case(
        "Mistral3ForConditionalGeneration",
        {"vision_config": _PIXTRAL, "tie_word_embeddings": False},
        published=True,
        text={"model_type": "mistral", "head_dim": 12, "rope_theta": 1000.0, "sliding_window": None},
    ),
    "granite": Case("GraniteForCausalLM", _GRANITE),
    "granite_published": Case(
        "GraniteForCausalLM",
        _GRANITE
        | {
            "rope_parameters": None,
            "rope_theta": 1000.0,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        published=True,
    ),
}
