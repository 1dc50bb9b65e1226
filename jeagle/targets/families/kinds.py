"""What kind of value each field of a target's config.json must have, so that a wrong one is named before it is used.

The table has every field that a family reads or that transformers completes others from, and those of RoPE's sections.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jeagle.errors import UserError


def _whole(value: Any) -> bool:
    return type(value) is int  # a bool, which is an int in Python, is a wrong value


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(holds, value))


SECTIONS = ("text_config", "rope_scaling", "rope_parameters", "quantization_config", "compression_config")
"""Objects whose fields are checked too."""
_OBJECTS = """
    dual_chunk_attention_config per_layer_config config_groups sparsity_config full_attention sliding_attention
"""
_ABOVE_0 = """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size max_position_embeddings
    original_max_position_embeddings kv_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim
    linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
    decoder_sparse_step full_attention_interval interleave_moe_layer_step moe_layer_freq num_experts_per_tok
    experts_per_token n_group topk_group chunk_size local_size sliding_window_pattern _sliding_window_pattern
    no_rope_layer_interval num_global_key_value_heads global_head_dim
"""
_COUNTS = """
    intermediate_size intermediate_size_mlp moe_intermediate_size shared_expert_intermediate_size num_experts
    num_local_experts n_routed_experts n_shared_experts top_k_experts first_k_dense_replace max_window_layers
    q_lora_rank hidden_size_per_layer_input vocab_size_per_layer_input num_kv_shared_layers attention_chunk_size
    sliding_window sliding_window_size
"""
_NUMBERS_ABOVE_0 = """
    rope_theta rope_local_base_freq factor low_freq_factor high_freq_factor beta_fast beta_slow partial_rotary_factor
    query_pre_attn_scalar attn_scale floor_scale attention_multiplier logits_scaling embedding_multiplier
    residual_multiplier routed_scaling_factor
"""
_NUMBERS = """
    rms_norm_eps attn_logit_softcapping final_logit_softcapping swiglu_alpha swiglu_limit attention_factor attn_factor
    mscale mscale_all_dim llama_4_scaling_beta full_attn_mod interpolate_factor
"""
_SWITCHES = """
    attention_bias mlp_bias qkv_bias tie_word_embeddings use_sliding_window use_qk_norm use_double_wide_mlp truncate
    norm_topk_prob rope_interleave attention_k_eq_v attn_output_gate enable_moe_block
"""
_TEXTS = """
    model_type hidden_act hidden_activation scoring_func topk_method mamba_ssm_dtype rope_type type quant_method
    quant_algo format
"""
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "an object": (lambda v: isinstance(v, Mapping), f"{' '.join(SECTIONS)} {_OBJECTS}"),
    "a whole number above 0": (lambda v: _whole(v) and v > 0, _ABOVE_0),
    "a whole number, 0 or above": (lambda v: _whole(v) and v >= 0, _COUNTS),
    "a number above 0": (lambda v: _number(v) and v > 0, _NUMBERS_ABOVE_0),
    "a number, 0 or above": (lambda v: _number(v) and v >= 0, _NUMBERS),
    "true or false": (lambda v: isinstance(v, bool), _SWITCHES),
    "true, false or a number": (lambda v: isinstance(v, bool) or _number(v), "attn_temperature_tuning"),
    "true, false or a text": (lambda v: isinstance(v, bool | str), "use_bidirectional_attention"),
    "a text": (lambda v: isinstance(v, str), _TEXTS),
    "a list of texts": (_list_of(lambda v: isinstance(v, str)), "architectures layer_types"),
    "a list of whole numbers": (
        _list_of(lambda v: _whole(v) or isinstance(v, bool)),
        "no_rope_layers moe_layers mlp_only_layers",
    ),
    "a list of whole numbers above 0": (_list_of(lambda v: _whole(v) and v > 0), "weight_block_size"),
    "a list of numbers above 0": (_list_of(lambda v: _number(v) and v > 0), "short_factor long_factor"),
    "a token id or a list of token ids": (
        lambda v: _list_of(lambda i: _whole(i) and i >= 0)(v if isinstance(v, list | tuple) else [v]),
        "eos_token_id",
    ),
}
KINDS = {field: (kind, holds) for kind, (holds, fields) in _KINDS.items() for field in fields.split()}
"""What a field must be, in words and in code."""


def check_kinds(config: Mapping[str, Any], where: str = "The target's config.json", prefix: str = "") -> None:
    """UserError, which names the field, for a value of another kind than `KINDS` says; null counts as a missing field.

    Args:
      where: names the file, at the start of the message. prefix: of the section that `config` is.
    """
    for name, value in config.items():
        kind, holds = KINDS.get(name, ("", None))
        if holds is None or value is None:
            continue
        if not holds(value):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise UserError(
                f"{where} has {prefix}{name} = {shown}; it must be {kind}: copy the model's own file there."
            )
        if isinstance(value, Mapping):
            check_kinds(value, where, f"{prefix}{name}.")
