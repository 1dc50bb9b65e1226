"""Llama and families that differ from it in a few options: Mistral, Ministral, SmolLM3, Granite, OLMo, Llama 4."""

from __future__ import annotations

import dataclasses

from jeagle.interfaces import LogitShape
from jeagle.targets.families.common import (
    LLAMA,
    Family,
    Names,
    Piece,
    Switches,
    attention_biases,
    attention_names,
    attention_spec,
    dense_spec,
    experts_gate_up,
    fused_rows,
    head_dim,
    layer_types,
    linear,
    merged,
    mlp_names,
    norm,
    pre_norm_names,
    rope_from_switches,
    sliding_windows,
    stem_names,
    target_spec,
)
from jeagle.targets.model.spec import AttentionTemperature, BlockSpec, DenseSpec, ExpertsSpec, RouterSpec, TargetSpec


def llama(switches: Switches) -> TargetSpec:
    mixer = attention_spec(switches, **attention_biases(switches))
    block = BlockSpec(mixer, dense_spec(switches, bias=bool(switches.get("mlp_bias", False))))
    return target_spec(switches, [block] * switches["num_hidden_layers"])


def mistral(switches: Switches) -> TargetSpec:
    switches.only(attention_bias=(False,))
    kind = "sliding_attention" if switches.get("sliding_window", 0) else "full_attention"
    windows = sliding_windows(switches, otherwise=lambda i: kind)
    blocks = [BlockSpec(attention_spec(switches, window=window), dense_spec(switches)) for window in windows]
    return target_spec(switches, blocks)


def ministral3(switches: Switches) -> TargetSpec:
    parameters = switches["rope_parameters"]
    beta, span = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    temperature = AttentionTemperature(float(beta), float(span)) if beta else None
    mixer = attention_spec(switches, window=switches.get("sliding_window", 0), temperature=temperature)
    return target_spec(switches, [BlockSpec(mixer, dense_spec(switches))] * switches["num_hidden_layers"])


def smollm3(switches: Switches) -> TargetSpec:
    windowed = bool(switches.get("use_sliding_window"))
    mlp = dense_spec(switches, bias=bool(switches.get("mlp_bias", False)))
    rope, rotates = rope_from_switches(switches), switches["no_rope_layers"]  # 1 for the layers with RoPE
    mixers = [
        attention_spec(
            switches, rope=rope if rotates[i] else None, window=window * windowed, **attention_biases(switches)
        )
        for i, window in enumerate(sliding_windows(switches))
    ]
    return target_spec(switches, [BlockSpec(mixer, mlp) for mixer in mixers])


def granite(switches: Switches) -> TargetSpec:
    mixer = attention_spec(switches, scale=float(switches["attention_multiplier"]), **attention_biases(switches))
    mlp = dense_spec(switches, bias=bool(switches.get("mlp_bias", False)))
    block = BlockSpec(mixer, mlp, residual=float(switches["residual_multiplier"]))
    return target_spec(
        switches,
        [block] * switches["num_hidden_layers"],
        embed_scale=float(switches["embedding_multiplier"]),
        logits=LogitShape(scale=1 / switches["logits_scaling"]),
    )


def olmo(switches: Switches) -> TargetSpec:
    """OLMo 2 and 3, with norms after mixer and MLP only, and norms of queries and keys over all heads together."""
    mixers = [
        attention_spec(
            switches,
            rope=rope_from_switches(switches, kind),
            window=window,
            qk_norm="all_heads",
            **attention_biases(switches),
        )
        for kind, window in zip(layer_types(switches), sliding_windows(switches), strict=True)
    ]
    blocks = [BlockSpec(mixer, dense_spec(switches), norms="post") for mixer in mixers]
    return target_spec(switches, blocks, rope=rope_from_switches(switches, "full_attention"))


def llama4(switches: Switches) -> TargetSpec:
    rotates, chunk = switches["no_rope_layers"], switches.get("attention_chunk_size", 0)  # 1 for the layers with RoPE
    scale, span = float(switches["attn_scale"]), float(switches["floor_scale"])
    temperature = AttentionTemperature(scale, span, 1) if switches.get("attn_temperature_tuning") else None
    normed = switches.get("use_qk_norm")
    plain = attention_spec(switches, interleaved=True, **attention_biases(switches))
    activation, width = switches.get("hidden_act", "silu"), switches["intermediate_size"]
    router = RouterSpec("sigmoid", weighs_input=True)
    experts = ExpertsSpec(
        switches["num_local_experts"], switches["num_experts_per_tok"], width, router, activation, shared_width=width
    )
    mlp = DenseSpec(switches["intermediate_size_mlp"], activation)
    switches.get("interleave_moe_layer_step")  # moe_layers lists the layers with experts
    sparse, blocks = set(switches["moe_layers"]), []
    for i, kind in enumerate(layer_types(switches, beside_full="chunked_attention")):
        mixer = dataclasses.replace(plain, chunk=chunk if kind == "chunked_attention" else 0)
        if rotates[i]:
            mixer = dataclasses.replace(mixer, qk_norm="rotated" if normed else "")
        else:
            mixer = dataclasses.replace(mixer, rope=None, temperature=temperature)
        blocks.append(BlockSpec(mixer, experts=experts) if i in sparse else BlockSpec(mixer, mlp))
    return target_spec(switches, blocks, head_dim=head_dim(switches))


_OLMO: Names = merged(
    stem_names(),
    attention_names(),
    mlp_names(),
    norm("after_mixer", "post_attention_layernorm"),
    norm("after_mlp", "post_feedforward_layernorm"),
)

_LLAMA4_EXPERTS = "model.layers.{i}.feed_forward.experts"


def _llama4_expert(part: str, together: Piece) -> tuple[Piece, Piece]:
    """Each expert in a tensor of its own, as in quantised checkpoints, or all of them in one tensor [E, in, out]."""
    return Piece(f"{_LLAMA4_EXPERTS}.{{e}}.{part}.weight"), together


_LLAMA4: Names = merged(
    stem_names(),
    pre_norm_names(),
    attention_names(),
    mlp_names(theirs="feed_forward"),
    mlp_names("moe.shared", "feed_forward.shared_expert"),
    linear("moe.router.proj", "feed_forward.router"),
    {
        f"blocks.moe.experts.{part}": _llama4_expert(part, Piece(f"{_LLAMA4_EXPERTS}.{fused}", rows, False))
        for part, fused, rows in (
            ("gate_proj", "gate_up_proj", fused_rows(0, experts_gate_up)),
            ("up_proj", "gate_up_proj", fused_rows(1, experts_gate_up)),
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
