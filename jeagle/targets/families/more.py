"""DeepSeek V2 and V3, GLM-4 and GLM-4-MoE, Phi-3 and 4, gpt-oss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jeagle.targets.families.common import (
    LLAMA,
    Family,
    Names,
    Piece,
    attention,
    attention_names,
    dense,
    expert_names,
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
from jeagle.targets.spec import (
    AttentionSpec,
    BlockSpec,
    DenseSpec,
    ExpertsSpec,
    LatentSpec,
    RouterSpec,
    TargetSpec,
)


def _latent(switches: Switches) -> LatentSpec:
    switches.get("qk_head_dim")  # the sum of the two parts below
    switches.get("head_dim")
    return LatentSpec(
        heads=switches["num_attention_heads"],
        q_rank=switches.get("q_lora_rank", 0),
        kv_rank=switches["kv_lora_rank"],
        nope_dim=switches["qk_nope_head_dim"],
        rope_dim=switches["qk_rope_head_dim"],
        value_dim=switches["v_head_dim"],
        rope=rope_of(switches),
        interleaved=bool(switches.get("rope_interleave", True)),
        bias=bool(switches.get("attention_bias", False)),
    )


def _experts(switches: Switches, router: RouterSpec) -> ExpertsSpec:
    width = switches["moe_intermediate_size"]
    count = switches.get("n_routed_experts") or switches.get("num_local_experts") or switches["num_experts"]
    return ExpertsSpec(
        count,
        switches["num_experts_per_tok"],
        width,
        router,
        switches.get("hidden_act", "silu"),
        shared_width=width * switches.get("n_shared_experts", 0),
    )


def _dense_first(switches: Switches, mixer: Any, experts: ExpertsSpec, mlp: DenseSpec) -> list[BlockSpec]:
    first, total = switches.get("first_k_dense_replace", 0), switches["num_hidden_layers"]
    return [BlockSpec(mixer, mlp) if i < first else BlockSpec(mixer, experts=experts) for i in range(total)]


def deepseek_v2(switches: Switches) -> TargetSpec:
    switches.only(topk_method=("greedy", "group_limited_greedy"), norm_topk_prob=(False,), moe_layer_freq=(1,))
    switches.only(scoring_func=("softmax",), mlp_bias=(False,))
    grouped = switches["topk_method"] == "group_limited_greedy"
    groups, chosen = switches.get("n_group", 0), switches.get("topk_group", 0)
    router = RouterSpec(
        "softmax",
        scale=float(switches["routed_scaling_factor"]),
        groups=groups if grouped else 0,
        chosen_groups=chosen if grouped else 0,
    )
    blocks = _dense_first(switches, _latent(switches), _experts(switches, router), dense(switches))
    return target(switches, blocks)


def _top2_router(switches: Switches) -> RouterSpec:
    return RouterSpec(
        "sigmoid",
        renormalised=bool(switches.get("norm_topk_prob", True)),
        scale=float(switches["routed_scaling_factor"]),
        groups=switches["n_group"],
        chosen_groups=switches["topk_group"],
        group_score="top2",
        correction=True,
    )


def deepseek_v3(switches: Switches) -> TargetSpec:
    switches.only(topk_method=("noaux_tc",), scoring_func=("sigmoid",), moe_layer_freq=(1,))
    experts = _experts(switches, _top2_router(switches))
    return target(switches, _dense_first(switches, _latent(switches), experts, dense(switches)))


def glm4_moe(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    mixer = attention(switches, qkv_bias=bias, qk_norm="head" if switches.get("use_qk_norm") else "")
    experts = _experts(switches, _top2_router(switches))
    return target(switches, _dense_first(switches, mixer, experts, dense(switches)))


def glm4(switches: Switches) -> TargetSpec:
    mixer = attention(switches, qkv_bias=bool(switches.get("attention_bias", True)), interleaved=True)
    return target(switches, [BlockSpec(mixer, dense(switches), norms="both")] * switches["num_hidden_layers"])


def phi3(switches: Switches) -> TargetSpec:
    switches.get("original_max_position_embeddings")
    switches.only(full_attn_mod=(1,), interpolate_factor=(1,))  # Phi-4-mini's own code reads these
    mixer = attention(switches, window=switches.get("sliding_window", 0))
    return target(switches, [BlockSpec(mixer, dense(switches))] * switches["num_hidden_layers"])


def gpt_oss(switches: Switches) -> TargetSpec:
    switches.only(hidden_act=("silu",), experts_per_token=(switches["num_experts_per_tok"],))
    bias, window = bool(switches.get("attention_bias", True)), switches.get("sliding_window", 0)
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
        attention(
            switches, window=window if kind == "sliding_attention" else 0, sinks=True, qkv_bias=bias, out_bias=bias
        )
        for kind in layer_types(switches)
    ]
    return target(switches, [BlockSpec(mixer, experts=experts) for mixer in mixers])


def _fused_heads(part: int) -> Callable[[BlockSpec], np.ndarray]:
    """Rows of q, k or v in one projection."""

    def rows(block: BlockSpec) -> np.ndarray:
        mixer = block.mixer
        assert isinstance(mixer, AttentionSpec)
        queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        return np.split(np.arange(queries + 2 * keys), [queries, queries + keys])[part]

    return rows


def _fused_mlp(second: bool) -> Callable[[BlockSpec], np.ndarray]:
    def rows(block: BlockSpec) -> np.ndarray:
        assert block.mlp is not None
        return np.arange(block.mlp.width) + (block.mlp.width if second else 0)

    return rows


def _latent_rows(values: bool) -> Callable[[BlockSpec], np.ndarray]:
    """kv_b_proj holds each head's key part and value part one after the other."""

    def rows(block: BlockSpec) -> np.ndarray:
        mixer = block.mixer
        assert isinstance(mixer, LatentSpec)
        places = np.arange(mixer.heads * (mixer.nope_dim + mixer.value_dim)).reshape(mixer.heads, -1)
        return (places[:, mixer.nope_dim :] if values else places[:, : mixer.nope_dim]).reshape(-1)

    return rows


def _every_other(first: int) -> Callable[[BlockSpec], np.ndarray]:
    def rows(block: BlockSpec) -> np.ndarray:
        assert block.experts is not None
        return 2 * np.arange(block.experts.width) + first

    return rows


_LAYER = "model.layers.{i}."
_FUSED_MLP: Names = merged(
    linear("mlp.gate_proj", "mlp.gate_up_proj", rows=_fused_mlp(False)),
    linear("mlp.up_proj", "mlp.gate_up_proj", rows=_fused_mlp(True)),
    linear("mlp.down_proj", "mlp.down_proj"),
)

_PHI3: Names = merged(
    stem_names(),
    pre_norm_names(),
    linear("mixer.q_proj", "self_attn.qkv_proj", rows=_fused_heads(0)),
    linear("mixer.k_proj", "self_attn.qkv_proj", rows=_fused_heads(1)),
    linear("mixer.v_proj", "self_attn.qkv_proj", rows=_fused_heads(2)),
    linear("mixer.o_proj", "self_attn.o_proj"),
    _FUSED_MLP,
)

_GLM4: Names = merged(
    stem_names(),
    attention_names(),
    _FUSED_MLP,
    norm("before_mixer", "input_layernorm"),
    norm("after_mixer", "post_self_attn_layernorm"),
    norm("before_mlp", "post_attention_layernorm"),
    norm("after_mlp", "post_mlp_layernorm"),
)

_SHARED_MOE: Names = merged(
    expert_names(),
    linear("mixture.router.proj", "mlp.gate"),
    {"blocks.mixture.router.correction": Piece(f"{_LAYER}mlp.gate.e_score_correction_bias")},
    mlp_names("mixture.shared", "mlp.shared_experts"),
)

_DEEPSEEK: Names = merged(
    stem_names(),
    pre_norm_names(),
    mlp_names(),
    _SHARED_MOE,
    linear("mixer.q_proj", "self_attn.q_proj"),
    linear("mixer.q_a_proj", "self_attn.q_a_proj"),
    norm("mixer.q_a_norm", "self_attn.q_a_layernorm"),
    linear("mixer.q_b_proj", "self_attn.q_b_proj"),
    linear("mixer.kv_a_proj", "self_attn.kv_a_proj_with_mqa"),
    norm("mixer.kv_a_norm", "self_attn.kv_a_layernorm"),
    linear("mixer.k_b_proj", "self_attn.kv_b_proj", rows=_latent_rows(False)),
    linear("mixer.v_b_proj", "self_attn.kv_b_proj", rows=_latent_rows(True)),
    linear("mixer.o_proj", "self_attn.o_proj"),
)

_GPT_OSS_EXPERTS = f"{_LAYER}mlp.experts."
_GPT_OSS: Names = merged(
    stem_names(),
    pre_norm_names(),
    attention_names(),
    linear("mixture.router.proj", "mlp.router"),
    {
        "blocks.mixer.sinks": Piece(f"{_LAYER}self_attn.sinks"),
        # Gate and up are interleaved, and the matrices lie [in, out].
        "blocks.mixture.experts.gate_proj": Piece(f"{_GPT_OSS_EXPERTS}gate_up_proj", _every_other(0), transposed=False),
        "blocks.mixture.experts.up_proj": Piece(f"{_GPT_OSS_EXPERTS}gate_up_proj", _every_other(1), transposed=False),
        "blocks.mixture.experts.down_proj": Piece(f"{_GPT_OSS_EXPERTS}down_proj", transposed=False),
        "blocks.mixture.experts.gate_bias": Piece(
            f"{_GPT_OSS_EXPERTS}gate_up_proj_bias", _every_other(0), transposed=False
        ),
        "blocks.mixture.experts.up_bias": Piece(
            f"{_GPT_OSS_EXPERTS}gate_up_proj_bias", _every_other(1), transposed=False
        ),
        "blocks.mixture.experts.down_bias": Piece(f"{_GPT_OSS_EXPERTS}down_proj_bias", transposed=False),
    },
)

FAMILIES = {
    "DeepseekV2ForCausalLM": Family(deepseek_v2, _DEEPSEEK, "deepseek_v2"),
    "DeepseekV3ForCausalLM": Family(deepseek_v3, _DEEPSEEK, "deepseek_v3"),
    "Glm4ForCausalLM": Family(glm4, _GLM4, "glm4"),
    "Glm4MoeForCausalLM": Family(glm4_moe, merged(LLAMA, _SHARED_MOE), "glm4_moe"),
    "Phi3ForCausalLM": Family(phi3, _PHI3, "phi3"),
    "GptOssForCausalLM": Family(gpt_oss, _GPT_OSS, "gpt_oss"),
}
