"""Qwen 3-Next and 3.5: gated attention now and then, the gated delta rule in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jeagle.targets.families.common import (
    Family,
    Names,
    Piece,
    attention,
    attention_names,
    dense,
    layer_types,
    merged,
    mlp_names,
    norm,
    pre_norm_names,
    stem_names,
    target,
)
from jeagle.targets.families.qwen import MOE, experts_of, sparse_blocks
from jeagle.targets.families.switches import Switches
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DeltaSpec, ExpertsSpec, RouterSpec, TargetSpec


def _hybrid_mixers(switches: Switches) -> list[AttentionSpec | DeltaSpec]:
    """Gated attention now and then, the gated delta rule in between."""
    bias = bool(switches.get("attention_bias", False))
    full = attention(switches, qk_norm="head", gated=True, qkv_bias=bias, out_bias=bias)
    delta = DeltaSpec(
        switches["linear_num_key_heads"],
        switches["linear_num_value_heads"],
        switches["linear_key_head_dim"],
        switches["linear_value_head_dim"],
        switches["linear_conv_kernel_dim"],
    )
    switches.get("full_attention_interval")  # which layers are which is listed in layer_types
    return [
        delta if kind == "linear_attention" else full for kind in layer_types(switches, beside_full="linear_attention")
    ]


def qwen3_next(switches: Switches) -> TargetSpec:
    return target(switches, sparse_blocks(switches, _hybrid_mixers(switches), experts_of(switches, shared=True)))


def qwen3_5(switches: Switches) -> TargetSpec:
    switches.only(attn_output_gate=(True,), mamba_ssm_dtype=("float32",))
    return target(switches, [BlockSpec(mixer, dense(switches)) for mixer in _hybrid_mixers(switches)])


def qwen3_5_moe(switches: Switches) -> TargetSpec:
    switches.only(attn_output_gate=(True,), mamba_ssm_dtype=("float32",))
    found = experts_of(switches, shared=True)
    router = RouterSpec("softmax", renormalised=True)
    experts = ExpertsSpec(**{**vars(found), "router": router})
    return target(switches, [BlockSpec(mixer, experts=experts) for mixer in _hybrid_mixers(switches)])


# Gated attention: each head's query and gate lie one after the other in q_proj.


def _query_rows(gate: bool) -> Callable[[BlockSpec], np.ndarray]:
    def rows(block: BlockSpec) -> np.ndarray:
        mixer = block.mixer
        assert isinstance(mixer, AttentionSpec)
        places = np.arange(2 * mixer.heads * mixer.head_dim).reshape(mixer.heads, 2, mixer.head_dim)
        return places[:, int(gate)].reshape(-1)

    return rows


def _grouped_rows(part: int, parts: Callable[[DeltaSpec], list[int]]) -> Callable[[BlockSpec], np.ndarray]:
    """Rows of one part where each key head holds its share of every part, one after the other (Qwen3-Next)."""

    def rows(block: BlockSpec) -> np.ndarray:
        mixer = block.mixer
        assert isinstance(mixer, DeltaSpec)
        sizes = parts(mixer)
        places = np.arange(mixer.key_heads * sum(sizes)).reshape(mixer.key_heads, sum(sizes))
        start = sum(sizes[:part])
        return places[:, start : start + sizes[part]].reshape(-1)

    return rows


def _qkvz(mixer: DeltaSpec) -> list[int]:
    share = mixer.value_heads // mixer.key_heads * mixer.value_dim
    return [mixer.key_dim, mixer.key_dim, share, share]


def _ba(mixer: DeltaSpec) -> list[int]:
    return [mixer.value_heads // mixer.key_heads] * 2


def _qkv_rows(part: int) -> Callable[[BlockSpec], np.ndarray]:
    """Rows of q, k or v where they lie one after the other (Qwen3.5)."""

    def rows(block: BlockSpec) -> np.ndarray:
        mixer = block.mixer
        assert isinstance(mixer, DeltaSpec)
        keys, values = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
        return np.split(np.arange(2 * keys + values), [keys, 2 * keys])[part]

    return rows


_DELTA = "model.layers.{i}.linear_attn."


def _delta_names(own: Names) -> Names:
    return own | {
        "blocks.mixer.conv": Piece(f"{_DELTA}conv1d.weight", transposed=False, squeeze=True),
        "blocks.mixer.a_log": Piece(f"{_DELTA}A_log"),
        "blocks.mixer.dt_bias": Piece(f"{_DELTA}dt_bias"),
        "blocks.mixer.norm": Piece(f"{_DELTA}norm.weight"),
    }


def _either(key: str, attention_piece: Piece, delta_piece: Piece) -> Names:
    """Mixers of both kinds have this parameter; a layer has one of the two tensors."""
    return {f"blocks.mixer.{key}.kernel": (attention_piece, delta_piece)}


def _hybrid_names(q: Piece, k: Piece, v: Piece, z: Piece, b: Piece, a: Piece) -> Names:
    own = "model.layers.{i}.self_attn."
    return merged(
        stem_names(1.0),
        pre_norm_names(1.0),
        attention_names(),
        norm("mixer.q_norm", "self_attn.q_norm", 1.0),
        norm("mixer.k_norm", "self_attn.k_norm", 1.0),
        _delta_names(
            {"blocks.mixer.z_proj.kernel": z, "blocks.mixer.b_proj.kernel": b, "blocks.mixer.a_proj.kernel": a}
        ),
        {
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
    *(Piece(f"{_DELTA}in_proj_qkvz.weight", _grouped_rows(part, _qkvz)) for part in range(4)),
    *(Piece(f"{_DELTA}in_proj_ba.weight", _grouped_rows(part, _ba)) for part in range(2)),
)

_QWEN3_5: Names = _hybrid_names(
    *(Piece(f"{_DELTA}in_proj_qkv.weight", _qkv_rows(part)) for part in range(3)),
    *(Piece(f"{_DELTA}in_proj_{part}.weight") for part in "zba"),
)

FAMILIES = {
    "Qwen3NextForCausalLM": Family(qwen3_next, _QWEN3_NEXT, "qwen3_next"),
    "Qwen3_5ForCausalLM": Family(qwen3_5, _QWEN3_5, "qwen3_5_text"),
    "Qwen3_5MoeForCausalLM": Family(qwen3_5_moe, _QWEN3_5, "qwen3_5_moe_text"),
}
