"""Llama and families that differ from it in a few options, or in that one tensor stores several of its weights.

Mistral, Ministral, SmolLM3, Granite, OLMo, Llama 4; GLM-4 (dense), Phi-3 and 4, gpt-oss.
"""

import dataclasses
import functools
from typing import Any, Literal

from jeagle.interfaces import LogitShape
from jeagle.targets.families import common
from jeagle.targets.families.common import LAYER, LLAMA, Family, Names, Piece, Switches
from jeagle.targets.model.spec import AttentionTemperature, BlockSpec, DenseSpec, ExpertsSpec, RouterSpec, TargetSpec


def llama(switches: Switches) -> TargetSpec:
    mixer = common.attention_spec(switches, **common.attention_biases(switches))
    block = BlockSpec(mixer, common.dense_spec(switches, bias=bool(switches.get("mlp_bias", False))))
    return common.target_spec(switches, [block] * switches["num_hidden_layers"])


def mistral(switches: Switches) -> TargetSpec:
    switches.only(attention_bias=(False,))
    kind = "sliding_attention" if switches.get("sliding_window", 0) else "full_attention"
    windows = common.sliding_windows(switches, otherwise=lambda i: kind)
    blocks = [
        BlockSpec(common.attention_spec(switches, window=window), common.dense_spec(switches)) for window in windows
    ]
    return common.target_spec(switches, blocks)


def ministral3(switches: Switches) -> TargetSpec:
    parameters = switches["rope_parameters"]
    beta, span = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    temperature = AttentionTemperature(float(beta), float(span)) if beta else None
    mixer = common.attention_spec(switches, window=switches.get("sliding_window", 0), temperature=temperature)
    return common.target_spec(switches, [BlockSpec(mixer, common.dense_spec(switches))] * switches["num_hidden_layers"])


def smollm3(switches: Switches) -> TargetSpec:
    windowed = bool(switches.get("use_sliding_window"))
    mlp = common.dense_spec(switches, bias=bool(switches.get("mlp_bias", False)))
    rope, rotates = common.rope_from_switches(switches), switches["no_rope_layers"]  # 1 for the layers with RoPE
    biases = common.attention_biases(switches)
    mixers = [
        common.attention_spec(switches, rope=rope if rotates[i] else None, window=window * windowed, **biases)
        for i, window in enumerate(common.sliding_windows(switches))
    ]
    return common.target_spec(switches, [BlockSpec(mixer, mlp) for mixer in mixers])


def granite(switches: Switches) -> TargetSpec:
    mixer = common.attention_spec(
        switches, scale=float(switches["attention_multiplier"]), **common.attention_biases(switches)
    )
    mlp = common.dense_spec(switches, bias=bool(switches.get("mlp_bias", False)))
    blocks = [BlockSpec(mixer, mlp, residual=float(switches["residual_multiplier"]))] * switches["num_hidden_layers"]
    logits = LogitShape(scale=1 / switches["logits_scaling"])
    return common.target_spec(switches, blocks, embed_scale=float(switches["embedding_multiplier"]), logits=logits)


def olmo(switches: Switches) -> TargetSpec:
    """OLMo 2 and 3, with norms after mixer and MLP only, and norms of queries and keys over all heads together."""
    own: dict[str, Any] = {"qk_norm": "all_heads", **common.attention_biases(switches)}
    mixers = [
        common.attention_spec(switches, rope=common.rope_from_switches(switches, kind), window=window, **own)
        for kind, window in zip(common.layer_types(switches), common.sliding_windows(switches), strict=True)
    ]
    blocks = [BlockSpec(mixer, common.dense_spec(switches), norms="post") for mixer in mixers]
    return common.target_spec(switches, blocks, rope=common.rope_from_switches(switches, "full_attention"))


def llama4(switches: Switches) -> TargetSpec:
    rotates, chunk = switches["no_rope_layers"], switches.get("attention_chunk_size", 0)  # 1 for the layers with RoPE
    scale, span = float(switches["attn_scale"]), float(switches["floor_scale"])
    temperature = AttentionTemperature(scale, span, 1) if switches.get("attn_temperature_tuning") else None
    plain = common.attention_spec(switches, interleaved=True, **common.attention_biases(switches))
    rotating = dataclasses.replace(plain, qk_norm="rotated" if switches.get("use_qk_norm") else "")
    standing = dataclasses.replace(plain, rope=None, temperature=temperature)
    activation, width = switches.get("hidden_act", "silu"), switches["intermediate_size"]
    router = RouterSpec("sigmoid", weighs_input=True)
    count, chosen = switches["num_local_experts"], switches["num_experts_per_tok"]
    experts = ExpertsSpec(count, chosen, width, router, activation, shared_width=width)
    mlp = DenseSpec(switches["intermediate_size_mlp"], activation)
    switches.get("interleave_moe_layer_step")  # moe_layers lists the layers with experts
    sparse, blocks = set(switches["moe_layers"]), []
    for i, kind in enumerate(common.layer_types(switches, beside_full="chunked_attention")):
        mixer = rotating if rotates[i] else standing
        mixer = dataclasses.replace(mixer, chunk=chunk if kind == "chunked_attention" else 0)
        blocks.append(BlockSpec(mixer, experts=experts) if i in sparse else BlockSpec(mixer, mlp))
    return common.target_spec(switches, blocks, head_dim=common.head_dim(switches))


def glm(switches: Switches, norms: Literal["pre", "both"] = "pre") -> TargetSpec:
    mixer = common.attention_spec(switches, qkv_bias=bool(switches.get("attention_bias", True)), interleaved=True)
    return common.target_spec(
        switches, [BlockSpec(mixer, common.dense_spec(switches), norms=norms)] * switches["num_hidden_layers"]
    )


def phi3(switches: Switches) -> TargetSpec:
    switches.get("original_max_position_embeddings")
    switches.only(full_attn_mod=(1,), interpolate_factor=(1,))  # keys of Phi-4-mini's own code
    mixer = common.attention_spec(switches, window=switches.get("sliding_window", 0))
    return common.target_spec(switches, [BlockSpec(mixer, common.dense_spec(switches))] * switches["num_hidden_layers"])


def gpt_oss(switches: Switches) -> TargetSpec:
    switches.only(hidden_act=("silu",), experts_per_token=(switches["num_experts_per_tok"],))
    bias = bool(switches.get("attention_bias", True))
    count, chosen = switches["num_local_experts"], switches["num_experts_per_tok"]
    width, router = switches["intermediate_size"], RouterSpec("chosen", bias=True)
    clamp = float(switches.get("swiglu_alpha", 1.702)), float(switches.get("swiglu_limit", 7.0))
    experts = ExpertsSpec(count, chosen, width, router, "clamped_swiglu", bias=True, clamp=clamp)
    own = {"sinks": True, "qkv_bias": bias, "out_bias": bias}
    mixers = [common.attention_spec(switches, window=window, **own) for window in common.sliding_windows(switches)]
    return common.target_spec(switches, [BlockSpec(mixer, experts=experts) for mixer in mixers])


def _qkv(block: Any) -> list[int]:
    """Numbers of rows of queries, keys and values in one projection."""
    mixer = block.mixer
    return [mixer.heads * mixer.head_dim] + [mixer.kv_heads * mixer.head_dim] * 2


_OLMO: Names = common.merged(
    common.stem_names(),
    common.attention_names(),
    common.mlp_names(),
    common.norm("after_mixer", "post_attention_layernorm"),
    common.norm("after_mlp", "post_feedforward_layernorm"),
)

_LLAMA4: Names = common.merged(
    common.stem_names(),
    common.pre_norm_names(),
    common.attention_names(),
    common.mlp_names(theirs="feed_forward"),
    common.mlp_names("moe.shared", "feed_forward.shared_expert"),
    common.linear("moe.router.proj", "feed_forward.router"),
    # All experts are in one tensor [E, in, out], unlike the tensors [E, out, in] of `expert_names`.
    {
        key: (alone, dataclasses.replace(together, transposed=False))
        for key, (alone, together) in common.expert_names("feed_forward.experts").items()
    },
)

_FUSED_MLP: Names = common.merged(
    common.fused_linears("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), lambda block: [block.mlp.width] * 2),
    common.linear("mlp.down_proj", "mlp.down_proj"),
)

_PHI3: Names = common.merged(
    common.stem_names(),
    common.pre_norm_names(),
    common.fused_linears("self_attn.qkv_proj", ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), _qkv),
    common.linear("mixer.o_proj", "self_attn.o_proj"),
    _FUSED_MLP,
)

_GLM: Names = common.merged(common.stem_names(), common.pre_norm_names(), common.attention_names(), _FUSED_MLP)

_GLM4: Names = common.merged(
    common.stem_names(),
    common.attention_names(),
    _FUSED_MLP,
    common.norm("before_mixer", "input_layernorm"),
    common.norm("after_mixer", "post_self_attn_layernorm"),
    common.norm("before_mlp", "post_attention_layernorm"),
    common.norm("after_mlp", "post_mlp_layernorm"),
)

_EVERY_OTHER = [common.fused_rows(first, lambda block: [1, 1], lambda block: block.experts.width) for first in range(2)]
_GPT_OSS: Names = common.merged(
    common.stem_names(),
    common.pre_norm_names(),
    common.attention_names(),
    common.linear("moe.router.proj", "mlp.router"),
    {"blocks.mixer.sinks": Piece(f"{LAYER}self_attn.sinks")},
    # Gate and up are interleaved, and the matrices are [in, out].
    {
        f"blocks.moe.experts.{ours}_{kind}": Piece(f"{LAYER}mlp.experts.{theirs}{suffix}", rows, transposed=False)
        for kind, suffix in (("proj", ""), ("bias", "_bias"))
        for ours, theirs, rows in (
            ("gate", "gate_up_proj", _EVERY_OTHER[0]),
            ("up", "gate_up_proj", _EVERY_OTHER[1]),
            ("down", "down_proj", None),
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
    "GlmForCausalLM": Family(glm, _GLM, "glm"),
    "Glm4ForCausalLM": Family(functools.partial(glm, norms="both"), _GLM4, "glm4"),
    "Phi3ForCausalLM": Family(phi3, _PHI3, "phi3"),
    "GptOssForCausalLM": Family(gpt_oss, _GPT_OSS, "gpt_oss"),
}
