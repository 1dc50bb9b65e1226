"""DeepSeek V2 and V3, and GLM-4-MoE, whose router is V3's."""

from typing import Any

from jeagle.targets.families import common
from jeagle.targets.families.common import LLAMA, Family, Names, Piece, Switches
from jeagle.targets.model.spec import BlockSpec, ExpertsSpec, LatentSpec, RouterSpec, TargetSpec


def _latent(switches: Switches) -> LatentSpec:
    switches.get("qk_head_dim")  # the sum of nope_dim and rope_dim
    switches.get("head_dim")
    return LatentSpec(
        heads=switches["num_attention_heads"],
        q_rank=switches.get("q_lora_rank", 0),
        kv_rank=switches["kv_lora_rank"],
        nope_dim=switches["qk_nope_head_dim"],
        rope_dim=switches["qk_rope_head_dim"],
        value_dim=switches["v_head_dim"],
        rope=common.rope_from_switches(switches),
        interleaved=bool(switches.get("rope_interleave", True)),
        bias=bool(switches.get("attention_bias", False)),
    )


def _routed_spec(switches: Switches, mixer: Any, router: RouterSpec) -> TargetSpec:
    """The TargetSpec of layers of which all but the first few have experts."""
    width = switches["moe_intermediate_size"]
    count = switches.get("n_routed_experts") or switches.get("num_local_experts") or switches["num_experts"]
    shared, activation = width * switches.get("n_shared_experts", 0), switches.get("hidden_act", "silu")
    experts = ExpertsSpec(count, switches["num_experts_per_tok"], width, router, activation, shared_width=shared)
    dense, total = switches.get("first_k_dense_replace", 0), switches["num_hidden_layers"]
    mlp, sparse = BlockSpec(mixer, common.dense_spec(switches)), BlockSpec(mixer, experts=experts)
    return common.target_spec(switches, [mlp if i < dense else sparse for i in range(total)])


def deepseek_v2(switches: Switches) -> TargetSpec:
    switches.only(topk_method=("greedy", "group_limited_greedy"), norm_topk_prob=(False,), moe_layer_freq=(1,))
    switches.only(scoring_func=("softmax",), mlp_bias=(False,))
    grouped = switches["topk_method"] == "group_limited_greedy"
    groups, chosen_groups = switches.get("n_group", 0) * grouped, switches.get("topk_group", 0) * grouped
    scale = float(switches["routed_scaling_factor"])
    router = RouterSpec("softmax", scale=scale, groups=groups, chosen_groups=chosen_groups)
    return _routed_spec(switches, _latent(switches), router)


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
    return _routed_spec(switches, _latent(switches), _top2_router(switches))


def glm4_moe(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    mixer = common.attention_spec(switches, qkv_bias=bias, qk_norm="head" if switches.get("use_qk_norm") else "")
    return _routed_spec(switches, mixer, _top2_router(switches))


_SHARED_MOE: Names = common.merged(
    common.expert_names(),
    common.linear("moe.router.proj", "mlp.gate"),
    {"blocks.moe.router.correction": Piece("model.layers.{i}.mlp.gate.e_score_correction_bias")},
    common.mlp_names("moe.shared", "mlp.shared_experts"),
)

_DEEPSEEK: Names = common.merged(
    common.stem_names(),
    common.pre_norm_names(),
    common.mlp_names(),
    _SHARED_MOE,
    common.linear("mixer.q_proj", "self_attn.q_proj"),
    common.linear("mixer.q_a_proj", "self_attn.q_a_proj"),
    common.norm("mixer.q_a_norm", "self_attn.q_a_layernorm"),
    common.linear("mixer.q_b_proj", "self_attn.q_b_proj"),
    common.linear("mixer.kv_a_proj", "self_attn.kv_a_proj_with_mqa"),
    common.norm("mixer.kv_a_norm", "self_attn.kv_a_layernorm"),
    # The key's part and then the value's part of each head.
    common.fused_linears(
        "self_attn.kv_b_proj",
        ("mixer.k_b_proj", "mixer.v_b_proj"),
        lambda block: [block.mixer.nope_dim, block.mixer.value_dim],
        lambda block: block.mixer.heads,
    ),
    common.linear("mixer.o_proj", "self_attn.o_proj"),
)

FAMILIES = {
    "DeepseekV2ForCausalLM": Family(deepseek_v2, _DEEPSEEK, "deepseek_v2"),
    "DeepseekV3ForCausalLM": Family(deepseek_v3, _DEEPSEEK, "deepseek_v3"),
    "Glm4MoeForCausalLM": Family(glm4_moe, common.merged(LLAMA, _SHARED_MOE), "glm4_moe"),
}
