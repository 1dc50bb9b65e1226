"""Llama and what differs from it by a switch or two: Mistral, Ministral, SmolLM3, Granite, OLMo, Llama 4."""

from __future__ import annotations

import dataclasses

import numpy as np

from jeagle.interfaces import LogitShape
from jeagle.targets.families.common import (
    LLAMA,
    Family,
    Names,
    Piece,
    attention,
    attention_names,
    dense,
    head_dim,
    layer_types,
    linear,
    merged,
    mlp_names,
    norm,
    pre_norm_names,
    rope_of,
    stem_names,
    target,
)
from jeagle.targets.families.switches import Switches
from jeagle.targets.model.spec import AttentionTemperature, BlockSpec, DenseSpec, ExpertsSpec, RouterSpec, TargetSpec


def llama(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    mixer = attention(switches, qkv_bias=bias, out_bias=bias)
    block = BlockSpec(mixer, dense(switches, bias=bool(switches.get("mlp_bias", False))))
    return target(switches, [block] * switches["num_hidden_layers"])


def mistral(switches: Switches) -> TargetSpec:
    window = switches.get("sliding_window", 0)
    switches.only(attention_bias=(False,))
    mixers = [
        attention(switches, window=window if kind == "sliding_attention" else 0)
        for kind in layer_types(switches, lambda i: "sliding_attention" if window else "full_attention")
    ]
    return target(switches, [BlockSpec(mixer, dense(switches)) for mixer in mixers])


def ministral3(switches: Switches) -> TargetSpec:
    parameters = switches["rope_parameters"]
    beta, span = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    heat = AttentionTemperature(beta, span) if beta else None
    window = switches.get("sliding_window", 0)
    mixer = attention(switches, window=window, temperature=heat)
    return target(switches, [BlockSpec(mixer, dense(switches))] * switches["num_hidden_layers"])


def smollm3(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    window = switches.get("sliding_window", 0) if switches.get("use_sliding_window") else 0
    mlp = dense(switches, bias=bool(switches.get("mlp_bias", False)))
    rope, turning = rope_of(switches), switches["no_rope_layers"]
    mixers = [
        attention(
            switches,
            rope=rope if turning[i] else None,
            window=window if kind == "sliding_attention" else 0,
            qkv_bias=bias,
            out_bias=bias,
        )
        for i, kind in enumerate(layer_types(switches))
    ]
    return target(switches, [BlockSpec(mixer, mlp) for mixer in mixers])


def granite(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    mixer = attention(switches, qkv_bias=bias, out_bias=bias, scale=float(switches["attention_multiplier"]))
    mlp = dense(switches, bias=bool(switches.get("mlp_bias", False)))
    block = BlockSpec(mixer, mlp, residual=float(switches["residual_multiplier"]))
    return target(
        switches,
        [block] * switches["num_hidden_layers"],
        embed_scale=float(switches["embedding_multiplier"]),
        logits=LogitShape(scale=1 / switches["logits_scaling"]),
    )


def olmo(switches: Switches) -> TargetSpec:
    """OLMo 2 and 3: norms after mixer and MLP only, queries and keys normed over all heads together."""
    bias = bool(switches.get("attention_bias", False))
    window = switches.get("sliding_window", 0)
    mixers = [
        attention(
            switches,
            rope=rope_of(switches, kind),
            window=window if kind == "sliding_attention" else 0,
            qk_norm="all_heads",
            qkv_bias=bias,
            out_bias=bias,
        )
        for kind in layer_types(switches)
    ]
    blocks = [BlockSpec(mixer, dense(switches), norms="post") for mixer in mixers]
    return target(switches, blocks, rope=rope_of(switches, "full_attention"))


def llama4(switches: Switches) -> TargetSpec:
    rope, turning = rope_of(switches), switches["no_rope_layers"]
    heat = AttentionTemperature(float(switches["attn_scale"]), float(switches["floor_scale"]), 1)
    heat_on, normed = switches.get("attn_temperature_tuning"), switches.get("use_qk_norm")
    bias = bool(switches.get("attention_bias", False))
    chunk = switches.get("attention_chunk_size", 0)
    plain = attention(switches, rope=rope, interleaved=True, qkv_bias=bias, out_bias=bias)
    activation, width = switches.get("hidden_act", "silu"), switches["intermediate_size"]
    router = RouterSpec("sigmoid", weighs_input=True)
    experts = ExpertsSpec(
        switches["num_local_experts"], switches["num_experts_per_tok"], width, router, activation, shared_width=width
    )
    mlp = DenseSpec(switches["intermediate_size_mlp"], activation)
    switches.get("interleave_moe_layer_step")  # which layers are sparse is listed in moe_layers
    sparse, blocks = set(switches["moe_layers"]), []
    for i, kind in enumerate(layer_types(switches, beside_full="chunked_attention")):
        mixer = dataclasses.replace(plain, chunk=chunk if kind == "chunked_attention" else 0)
        if turning[i]:
            mixer = dataclasses.replace(mixer, qk_norm="rotated" if normed else "")
        else:
            mixer = dataclasses.replace(mixer, rope=None, temperature=heat if heat_on else None)
        blocks.append(BlockSpec(mixer, experts=experts) if i in sparse else BlockSpec(mixer, mlp))
    return target(switches, blocks, head_dim=head_dim(switches))


def _half(second: bool):
    def rows(block: BlockSpec) -> np.ndarray:
        assert block.experts is not None
        return np.arange(block.experts.width) + (block.experts.width if second else 0)

    return rows


_OLMO: Names = merged(
    stem_names(),
    attention_names(),
    mlp_names(),
    norm("after_mixer", "post_attention_layernorm"),
    norm("after_mlp", "post_feedforward_layernorm"),
)

_LLAMA4_EXPERTS = "model.layers.{i}.feed_forward.experts"


def _llama4_expert(part: str, together: Piece) -> tuple[Piece, Piece]:
    """Experts one by one, as quantised checkpoints have them, or all of them in one tensor [E, in, out]."""
    return Piece(f"{_LLAMA4_EXPERTS}.{{e}}.{part}.weight"), together


_LLAMA4: Names = merged(
    stem_names(),
    pre_norm_names(),
    attention_names(),
    mlp_names(theirs="feed_forward"),
    mlp_names("moe.shared", "feed_forward.shared_expert"),
    linear("moe.router.proj", "feed_forward.router"),
    {
        f"blocks.moe.experts.{part}": _llama4_expert(part, Piece(f"{_LLAMA4_EXPERTS}.{whole}", rows, False))
        for part, whole, rows in (
            ("gate_proj", "gate_up_proj", _half(False)),
            ("up_proj", "gate_up_proj", _half(True)),
            ("down_proj", "down_proj", None),
        )
    },
)

FAMILIES = {
    "LlamaForCausalLM": Family(llama, LLAMA, "llama"),
    "MistralForCausalLM": Family(mistral, LLAMA, "mistral"),
    "MinistralForCausalLM": Family(mistral, LLAMA, "ministral"),
    "Ministral3ForCausalLM": Family(ministral3, LLAMA, "ministral3"),
    "SmolLM3ForCausalLM": Family(smollm3, LLAMA, "smollm3"),
    "GraniteForCausalLM": Family(granite, LLAMA, "granite"),
    "Olmo2ForCausalLM": Family(olmo, _OLMO, "olmo2"),
    "Olmo3ForCausalLM": Family(olmo, _OLMO, "olmo3"),
    "Llama4ForCausalLM": Family(llama4, _LLAMA4, "llama4_text"),
}
