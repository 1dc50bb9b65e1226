"""Qwen 2 to 3.5, dense and with experts, and Mixtral; most layers of Qwen3-Next and 3.5 have the gated delta rule."""

import dataclasses
from typing import Any

from jeagle.targets.families import common
from jeagle.targets.families.common import LAYER, LLAMA, Family, Names, Piece, Switches
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DeltaSpec, ExpertsSpec, RouterSpec, TargetSpec


def _windows(switches: Switches) -> list[int]:
    """The sliding window of each layer, 0 = none."""
    windowed, first = bool(switches.get("use_sliding_window", False)), switches.get("max_window_layers", 0)
    rule = lambda i: "sliding_attention" if windowed and i >= first else "full_attention"  # noqa: E731
    return [window * windowed for window in common.sliding_windows(switches, otherwise=rule)]


def qwen2(switches: Switches) -> TargetSpec:
    blocks = [
        BlockSpec(common.attention_spec(switches, qkv_bias=True, window=w), common.dense_spec(switches))
        for w in _windows(switches)
    ]
    longest = switches["max_position_embeddings"]
    if chunks := switches.get("dual_chunk_attention_config"):  # Qwen2.5-1M has plain attention within the first chunk
        longest = min(longest, chunks["chunk_size"] - chunks["local_size"])
    return common.target_spec(switches, blocks, max_positions=longest)


def qwen3(switches: Switches) -> TargetSpec:
    biases = common.attention_biases(switches)
    mixers = [common.attention_spec(switches, qk_norm="head", window=window, **biases) for window in _windows(switches)]
    return common.target_spec(switches, [BlockSpec(mixer, common.dense_spec(switches)) for mixer in mixers])


def _experts(switches: Switches, *, shared: bool) -> ExpertsSpec:
    """Qwen's experts; `shared` says whether every token goes through one more, gated MLP."""
    count = switches.get("num_experts") or switches["num_local_experts"]
    chosen, width = switches["num_experts_per_tok"], switches["moe_intermediate_size"]
    router = RouterSpec("softmax", renormalised=bool(switches.get("norm_topk_prob", False)))
    shared_width = switches["shared_expert_intermediate_size"] if shared else 0
    activation = switches.get("hidden_act", "silu")
    return ExpertsSpec(count, chosen, width, router, activation, shared_width=shared_width, shared_gate=shared)


def _sparse_blocks(switches: Switches, mixers: list, experts: ExpertsSpec) -> list[BlockSpec]:
    """Layers of which every `decoder_sparse_step`-th has experts, except for those in `mlp_only_layers`."""
    step, plain = switches.get("decoder_sparse_step", 1), set(switches.get("mlp_only_layers", ()))
    return [
        BlockSpec(mixer, common.dense_spec(switches))
        if i in plain or (i + 1) % step
        else BlockSpec(mixer, experts=experts)
        for i, mixer in enumerate(mixers)
    ]


def qwen2_moe(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("qkv_bias", True))
    mixers = [common.attention_spec(switches, qkv_bias=bias, window=w) for w in _windows(switches)]
    return common.target_spec(switches, _sparse_blocks(switches, mixers, _experts(switches, shared=True)))


def qwen3_moe(switches: Switches) -> TargetSpec:
    window = switches.get("sliding_window", 0) if switches.get("use_sliding_window") else 0
    mixer = common.attention_spec(switches, qk_norm="head", window=window, **common.attention_biases(switches))
    mixers = [mixer] * switches["num_hidden_layers"]
    return common.target_spec(switches, _sparse_blocks(switches, mixers, _experts(switches, shared=False)))


def mixtral(switches: Switches) -> TargetSpec:
    count, chosen = switches["num_local_experts"], switches["num_experts_per_tok"]
    width, router = switches["intermediate_size"], RouterSpec("softmax", renormalised=True)
    experts = ExpertsSpec(count, chosen, width, router, switches.get("hidden_act", "silu"))
    mixer = common.attention_spec(switches, window=switches.get("sliding_window", 0))
    return common.target_spec(switches, [BlockSpec(mixer, experts=experts)] * switches["num_hidden_layers"])


_MOE: Names = common.merged(
    common.expert_names(),
    common.linear("moe.router.proj", "mlp.gate"),
    common.mlp_names("moe.shared", "mlp.shared_expert"),
    common.linear("moe.shared_gate", "mlp.shared_expert_gate"),
)

_MIXTRAL: Names = common.merged(
    common.stem_names(),
    common.pre_norm_names(),
    common.attention_names(),
    common.expert_names("block_sparse_moe.experts", ("w1", "w3", "w2")),
    common.linear("moe.router.proj", "block_sparse_moe.gate"),
)


def _hybrid_mixers(switches: Switches) -> list[AttentionSpec | DeltaSpec]:
    full = common.attention_spec(switches, qk_norm="head", gated=True, **common.attention_biases(switches))
    sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    delta = DeltaSpec(*(switches[f"linear_{size}"] for size in sizes))
    switches.get("full_attention_interval")  # layer_types lists the kinds of layers
    kinds = common.layer_types(switches, beside_full="linear_attention")
    return [delta if kind == "linear_attention" else full for kind in kinds]


def qwen3_next(switches: Switches) -> TargetSpec:
    return common.target_spec(
        switches, _sparse_blocks(switches, _hybrid_mixers(switches), _experts(switches, shared=True))
    )


def qwen3_5(switches: Switches) -> TargetSpec:
    switches.only(attn_output_gate=(True,), mamba_ssm_dtype=("float32",))
    return common.target_spec(
        switches, [BlockSpec(mixer, common.dense_spec(switches)) for mixer in _hybrid_mixers(switches)]
    )


def qwen3_5_moe(switches: Switches) -> TargetSpec:
    switches.only(attn_output_gate=(True,), mamba_ssm_dtype=("float32",))
    experts = dataclasses.replace(_experts(switches, shared=True), router=RouterSpec("softmax", renormalised=True))
    return common.target_spec(switches, [BlockSpec(mixer, experts=experts) for mixer in _hybrid_mixers(switches)])


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


_DELTA = f"{LAYER}linear_attn."


def _hybrid_names(q: Piece, k: Piece, v: Piece, z: Piece, b: Piece, a: Piece) -> Names:
    """Names of a model of both kinds of layers, with the delta rules' own projections."""
    own = f"{LAYER}self_attn."
    # Gated attention stores each head's query and gate one after the other.
    query_rows, gate_rows = (
        common.fused_rows(i, lambda b: [b.mixer.head_dim] * 2, lambda b: b.mixer.heads) for i in (0, 1)
    )
    return common.merged(
        common.stem_names(1.0),
        common.pre_norm_names(1.0),
        common.attention_names(1.0),
        {
            # Mixers of both kinds have these; each layer has one of the two tensors.
            "blocks.mixer.q_proj.kernel": (Piece(f"{own}q_proj.weight", query_rows), q),
            "blocks.mixer.k_proj.kernel": (Piece(f"{own}k_proj.weight"), k),
            "blocks.mixer.v_proj.kernel": (Piece(f"{own}v_proj.weight"), v),
            "blocks.mixer.o_proj.kernel": (Piece(f"{own}o_proj.weight"), Piece(f"{_DELTA}out_proj.weight")),
            "blocks.mixer.z_proj.kernel": z,
            "blocks.mixer.b_proj.kernel": b,
            "blocks.mixer.a_proj.kernel": a,
            "blocks.mixer.conv": Piece(f"{_DELTA}conv1d.weight", transposed=False, squeeze=True),
            "blocks.mixer.a_log": Piece(f"{_DELTA}A_log"),
            "blocks.mixer.dt_bias": Piece(f"{_DELTA}dt_bias"),
            "blocks.mixer.norm": Piece(f"{_DELTA}norm.weight"),
            "blocks.mixer.gate_proj.kernel": Piece(f"{own}q_proj.weight", gate_rows),
            "blocks.mixer.gate_proj.bias": Piece(f"{own}q_proj.bias", gate_rows),
            "blocks.mixer.q_proj.bias": Piece(f"{own}q_proj.bias", query_rows),
        },
        common.mlp_names(),
        _MOE,
    )


_QWEN3_NEXT: Names = _hybrid_names(
    *(Piece(f"{_DELTA}in_proj_qkvz.weight", common.fused_rows(part, _qkvz, _key_heads)) for part in range(4)),
    *(Piece(f"{_DELTA}in_proj_ba.weight", common.fused_rows(part, _ba, _key_heads)) for part in range(2)),
)

_QWEN3_5: Names = _hybrid_names(
    *(Piece(f"{_DELTA}in_proj_qkv.weight", common.fused_rows(part, _qkv)) for part in range(3)),
    *(Piece(f"{_DELTA}in_proj_{part}.weight") for part in "zba"),
)

FAMILIES = {
    "Qwen2ForCausalLM": Family(qwen2, LLAMA, "qwen2"),
    "Qwen2MoeForCausalLM": Family(qwen2_moe, common.merged(LLAMA, _MOE), "qwen2_moe"),
    "Qwen3ForCausalLM": Family(qwen3, LLAMA, "qwen3"),
    "Qwen3MoeForCausalLM": Family(qwen3_moe, common.merged(LLAMA, _MOE), "qwen3_moe"),
    "MixtralForCausalLM": Family(mixtral, _MIXTRAL, "mixtral"),
    "Qwen3NextForCausalLM": Family(qwen3_next, _QWEN3_NEXT, "qwen3_next"),
    "Qwen3_5ForCausalLM": Family(qwen3_5, _QWEN3_5, "qwen3_5_text"),
    "Qwen3_5MoeForCausalLM": Family(qwen3_5_moe, _QWEN3_5, "qwen3_5_moe_text"),
}
