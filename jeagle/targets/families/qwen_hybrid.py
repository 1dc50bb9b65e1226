"""Qwen3-Next and Qwen 3.5: most layers have the gated delta rule, the others gated attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jeagle.targets.families.common import (
    Family,
    Names,
    Piece,
    Switches,
    attention_biases,
    attention_names,
    attention_spec,
    dense_spec,
    fused_rows,
    layer_types,
    merged,
    mlp_names,
    norm,
    pre_norm_names,
    stem_names,
    target_spec,
)
from jeagle.targets.families.qwen import MOE, experts_of, sparse_blocks
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DeltaSpec, RouterSpec, TargetSpec


def _hybrid_mixers(switches: Switches) -> list[AttentionSpec | DeltaSpec]:
    full = attention_spec(switches, qk_norm="head", gated=True, **attention_biases(switches))
    delta = DeltaSpec(
        switches["linear_num_key_heads"],
        switches["linear_num_value_heads"],
        switches["linear_key_head_dim"],
        switches["linear_value_head_dim"],
        switches["linear_conv_kernel_dim"],
    )
    switches.get("full_attention_interval")  # layer_types lists the kinds of layers
    return [
        delta if kind == "linear_attention" else full for kind in layer_types(switches, beside_full="linear_attention")
    ]


def qwen3_next(switches: Switches) -> TargetSpec:
    return target_spec(switches, sparse_blocks(switches, _hybrid_mixers(switches), experts_of(switches, shared=True)))


def qwen3_5(switches: Switches) -> TargetSpec:
    switches.only(attn_output_gate=(True,), mamba_ssm_dtype=("float32",))
    return target_spec(switches, [BlockSpec(mixer, dense_spec(switches)) for mixer in _hybrid_mixers(switches)])


def qwen3_5_moe(switches: Switches) -> TargetSpec:
    switches.only(attn_output_gate=(True,), mamba_ssm_dtype=("float32",))
    experts = dataclasses.replace(experts_of(switches, shared=True), router=RouterSpec("softmax", renormalised=True))
    return target_spec(switches, [BlockSpec(mixer, experts=experts) for mixer in _hybrid_mixers(switches)])


def _query_rows(gate: bool) -> Callable[[BlockSpec], np.ndarray]:
    """Rows of queries or of the gate of gated attention, which are stored one after the other for each head."""
    return fused_rows(int(gate), lambda block: [block.mixer.head_dim] * 2, lambda block: block.mixer.heads)


def _key_heads(block: Any) -> int:
    return block.mixer.key_heads


def _qkvz(block: Any) -> list[int]:
    """Numbers of rows of queries, keys, values and z for each key head of Qwen3-Next."""
    mixer = block.mixer
    values = mixer.value_heads // mixer.key_heads * mixer.value_dim
    return [mixer.key_dim, mixer.key_dim, values, values]


def _ba(block: Any) -> list[int]:
    """Numbers of rows of b and a for each key head of Qwen3-Next."""
    return [block.mixer.value_heads // block.mixer.key_heads] * 2


def _qkv(block: Any) -> list[int]:
    """Numbers of rows of queries, keys and values of Qwen3.5, which are stored one after the other."""
    mixer = block.mixer
    return [mixer.key_heads * mixer.key_dim] * 2 + [mixer.value_heads * mixer.value_dim]


_DELTA = "model.layers.{i}.linear_attn."


def _either(key: str, attention_piece: Piece, delta_piece: Piece) -> Names:
    """A parameter that mixers of both kinds have; each layer has one of the two tensors."""
    return {f"blocks.mixer.{key}.kernel": (attention_piece, delta_piece)}


def _hybrid_names(q: Piece, k: Piece, v: Piece, z: Piece, b: Piece, a: Piece) -> Names:
    own = "model.layers.{i}.self_attn."
    return merged(
        stem_names(1.0),
        pre_norm_names(1.0),
        attention_names(),
        norm("mixer.q_norm", "self_attn.q_norm", 1.0),
        norm("mixer.k_norm", "self_attn.k_norm", 1.0),
        {
            "blocks.mixer.z_proj.kernel": z,
            "blocks.mixer.b_proj.kernel": b,
            "blocks.mixer.a_proj.kernel": a,
            "blocks.mixer.conv": Piece(f"{_DELTA}conv1d.weight", transposed=False, squeeze=True),
            "blocks.mixer.a_log": Piece(f"{_DELTA}A_log"),
            "blocks.mixer.dt_bias": Piece(f"{_DELTA}dt_bias"),
            "blocks.mixer.norm": Piece(f"{_DELTA}norm.weight"),
            "blocks.mixer.gate_proj.kernel": Piece(f"{own}q_proj.weight", _query_rows(True)),
            "blocks.mixer.gate_proj.bias": Piece(f"{own}q_proj.bias", _query_rows(True)),
            "blocks.mixer.q_proj.bias": Piece(f"{own}q_proj.bias", _query_rows(False)),
        },
        _either("q_proj", Piece(f"{own}q_proj.weight", _query_rows(False)), q),
        _either("k_proj", Piece(f"{own}k_proj.weight"), k),
        _either("v_proj", Piece(f"{own}v_proj.weight"), v),
        _either("o_proj", Piece(f"{own}o_proj.weight"), Piece(f"{_DELTA}out_proj.weight")),
        mlp_names(),
        MOE,
    )


_QWEN3_NEXT: Names = _hybrid_names(
    *(Piece(f"{_DELTA}in_proj_qkvz.weight", fused_rows(part, _qkvz, _key_heads)) for part in range(4)),
    *(Piece(f"{_DELTA}in_proj_ba.weight", fused_rows(part, _ba, _key_heads)) for part in range(2)),
)

_QWEN3_5: Names = _hybrid_names(
    *(Piece(f"{_DELTA}in_proj_qkv.weight", fused_rows(part, _qkv)) for part in range(3)),
    *(Piece(f"{_DELTA}in_proj_{part}.weight") for part in "zba"),
)

FAMILIES = {
    "Qwen3NextForCausalLM": Family(qwen3_next, _QWEN3_NEXT, "qwen3_next"),
    "Qwen3_5ForCausalLM": Family(qwen3_5, _QWEN3_5, "qwen3_5_text"),
    "Qwen3_5MoeForCausalLM": Family(qwen3_5_moe, _QWEN3_5, "qwen3_5_moe_text"),
}
