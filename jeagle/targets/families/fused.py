"""Families that store several weights in one tensor: Phi-3 and 4, GLM-4 (dense), gpt-oss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jeagle.targets.families.common import (
    Family,
    Names,
    Piece,
    Switches,
    attention_names,
    attention_spec,
    dense_spec,
    fused_rows,
    linear,
    merged,
    norm,
    pre_norm_names,
    sliding_windows,
    stem_names,
    target_spec,
)
from jeagle.targets.model.spec import BlockSpec, ExpertsSpec, RouterSpec, TargetSpec


def glm(switches: Switches, norms: Literal["pre", "both"] = "pre") -> TargetSpec:
    mixer = attention_spec(switches, qkv_bias=bool(switches.get("attention_bias", True)), interleaved=True)
    return target_spec(switches, [BlockSpec(mixer, dense_spec(switches), norms=norms)] * switches["num_hidden_layers"])


def glm4(switches: Switches) -> TargetSpec:
    return glm(switches, "both")


def phi3(switches: Switches) -> TargetSpec:
    switches.get("original_max_position_embeddings")
    switches.only(full_attn_mod=(1,), interpolate_factor=(1,))  # keys of Phi-4-mini's own code
    mixer = attention_spec(switches, window=switches.get("sliding_window", 0))
    return target_spec(switches, [BlockSpec(mixer, dense_spec(switches))] * switches["num_hidden_layers"])


def gpt_oss(switches: Switches) -> TargetSpec:
    switches.only(hidden_act=("silu",), experts_per_token=(switches["num_experts_per_tok"],))
    bias = bool(switches.get("attention_bias", True))
    experts = ExpertsSpec(
        switches["num_local_experts"],
        switches["num_experts_per_tok"],
        switches["intermediate_size"],
        RouterSpec("chosen", bias=True),
        "clamped_swiglu",
        bias=True,
        clamp=(float(switches.get("swiglu_alpha", 1.702)), float(switches.get("swiglu_limit", 7.0))),
    )
    mixers = [
        attention_spec(switches, window=window, sinks=True, qkv_bias=bias, out_bias=bias)
        for window in sliding_windows(switches)
    ]
    return target_spec(switches, [BlockSpec(mixer, experts=experts) for mixer in mixers])


def _qkv(block: Any) -> list[int]:
    """Numbers of rows of queries, keys and values in one projection."""
    mixer = block.mixer
    return [mixer.heads * mixer.head_dim] + [mixer.kv_heads * mixer.head_dim] * 2


def _gate_up(block: Any) -> list[int]:
    """Numbers of rows of gate and up in one projection."""
    return [block.mlp.width] * 2


def _every_other(first: int) -> Callable[[BlockSpec], np.ndarray]:
    """Every other row, beginning with row `first`."""
    return fused_rows(first, lambda block: [1, 1], lambda block: block.experts.width)


_LAYER = "model.layers.{i}."
_FUSED_MLP: Names = merged(
    linear("mlp.gate_proj", "mlp.gate_up_proj", rows=fused_rows(0, _gate_up)),
    linear("mlp.up_proj", "mlp.gate_up_proj", rows=fused_rows(1, _gate_up)),
    linear("mlp.down_proj", "mlp.down_proj"),
)

_PHI3: Names = merged(
    stem_names(),
    pre_norm_names(),
    linear("mixer.q_proj", "self_attn.qkv_proj", rows=fused_rows(0, _qkv)),
    linear("mixer.k_proj", "self_attn.qkv_proj", rows=fused_rows(1, _qkv)),
    linear("mixer.v_proj", "self_attn.qkv_proj", rows=fused_rows(2, _qkv)),
    linear("mixer.o_proj", "self_attn.o_proj"),
    _FUSED_MLP,
)

_GLM: Names = merged(stem_names(), pre_norm_names(), attention_names(), _FUSED_MLP)

_GLM4: Names = merged(
    stem_names(),
    attention_names(),
    _FUSED_MLP,
    norm("before_mixer", "input_layernorm"),
    norm("after_mixer", "post_self_attn_layernorm"),
    norm("before_mlp", "post_attention_layernorm"),
    norm("after_mlp", "post_mlp_layernorm"),
)

_GPT_OSS_EXPERTS = f"{_LAYER}mlp.experts."
_GPT_OSS: Names = merged(
    stem_names(),
    pre_norm_names(),
    attention_names(),
    linear("moe.router.proj", "mlp.router"),
    {
        "blocks.mixer.sinks": Piece(f"{_LAYER}self_attn.sinks"),
        # Gate and up are interleaved, and the matrices are [in, out].
        "blocks.moe.experts.gate_proj": Piece(f"{_GPT_OSS_EXPERTS}gate_up_proj", _every_other(0), transposed=False),
        "blocks.moe.experts.up_proj": Piece(f"{_GPT_OSS_EXPERTS}gate_up_proj", _every_other(1), transposed=False),
        "blocks.moe.experts.down_proj": Piece(f"{_GPT_OSS_EXPERTS}down_proj", transposed=False),
        "blocks.moe.experts.gate_bias": Piece(
            f"{_GPT_OSS_EXPERTS}gate_up_proj_bias", _every_other(0), transposed=False
        ),
        "blocks.moe.experts.up_bias": Piece(f"{_GPT_OSS_EXPERTS}gate_up_proj_bias", _every_other(1), transposed=False),
        "blocks.moe.experts.down_bias": Piece(f"{_GPT_OSS_EXPERTS}down_proj_bias", transposed=False),
    },
)

FAMILIES = {
    "GlmForCausalLM": Family(glm, _GLM, "glm"),
    "Glm4ForCausalLM": Family(glm4, _GLM4, "glm4"),
    "Phi3ForCausalLM": Family(phi3, _PHI3, "phi3"),
    "GptOssForCausalLM": Family(gpt_oss, _GPT_OSS, "gpt_oss"),
}
