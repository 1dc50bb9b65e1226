"""Qwen 2, 2.5 and 3, dense and with experts; and Mixtral, whose experts came first."""

from __future__ import annotations

from jeagle.targets.families.common import (
    LLAMA,
    Family,
    Names,
    attention,
    attention_names,
    dense,
    expert_names,
    layer_types,
    linear,
    merged,
    mlp_names,
    pre_norm_names,
    stem_names,
    target,
)
from jeagle.targets.families.switches import Switches
from jeagle.targets.model.spec import BlockSpec, ExpertsSpec, RouterSpec, TargetSpec


def _windows(switches: Switches) -> list[int]:
    """Each layer's sliding window, 0 for none."""
    on, window = switches.get("use_sliding_window", False), switches.get("sliding_window", 0)
    first = switches.get("max_window_layers", 0)
    kinds = layer_types(switches, lambda i: "sliding_attention" if on and i >= first else "full_attention")
    return [window if kind == "sliding_attention" and on else 0 for kind in kinds]


def qwen2(switches: Switches) -> TargetSpec:
    blocks = [BlockSpec(attention(switches, qkv_bias=True, window=w), dense(switches)) for w in _windows(switches)]
    longest = switches["max_position_embeddings"]
    if chunks := switches.get("dual_chunk_attention_config"):  # Qwen2.5-1M: plain attention within the first chunk
        longest = min(longest, chunks["chunk_size"] - chunks["local_size"])
    return target(switches, blocks, max_positions=longest)


def qwen3(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    mixers = [attention(switches, qk_norm="head", qkv_bias=bias, out_bias=bias, window=w) for w in _windows(switches)]
    return target(switches, [BlockSpec(mixer, dense(switches)) for mixer in mixers])


def experts_of(switches: Switches, *, shared: bool) -> ExpertsSpec:
    count = switches.get("num_experts") or switches["num_local_experts"]
    return ExpertsSpec(
        count,
        switches["num_experts_per_tok"],
        switches["moe_intermediate_size"],
        RouterSpec("softmax", renormalised=bool(switches.get("norm_topk_prob", False))),
        switches.get("hidden_act", "silu"),
        shared_width=switches["shared_expert_intermediate_size"] if shared else 0,
        shared_gate=shared,
    )


def sparse_blocks(switches: Switches, mixers: list, experts: ExpertsSpec) -> list[BlockSpec]:
    """Every `decoder_sparse_step`-th layer has experts, but for those listed as dense."""
    step, plain = switches.get("decoder_sparse_step", 1), set(switches.get("mlp_only_layers", ()))
    blocks = []
    for i, mixer in enumerate(mixers):
        if i not in plain and experts.count > 0 and (i + 1) % step == 0:
            blocks.append(BlockSpec(mixer, experts=experts))
        else:
            blocks.append(BlockSpec(mixer, dense(switches)))
    return blocks


def qwen2_moe(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("qkv_bias", True))
    mixers = [attention(switches, qkv_bias=bias, window=w) for w in _windows(switches)]
    return target(switches, sparse_blocks(switches, mixers, experts_of(switches, shared=True)))


def qwen3_moe(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("attention_bias", False))
    window = switches.get("sliding_window", 0) if switches.get("use_sliding_window") else 0
    mixer = attention(switches, qk_norm="head", qkv_bias=bias, out_bias=bias, window=window)
    mixers = [mixer] * switches["num_hidden_layers"]
    return target(switches, sparse_blocks(switches, mixers, experts_of(switches, shared=False)))


def mixtral(switches: Switches) -> TargetSpec:
    experts = ExpertsSpec(
        switches["num_local_experts"],
        switches["num_experts_per_tok"],
        switches["intermediate_size"],
        RouterSpec("softmax", renormalised=True),
        switches.get("hidden_act", "silu"),
    )
    mixer = attention(switches, window=switches.get("sliding_window", 0))
    return target(switches, [BlockSpec(mixer, experts=experts)] * switches["num_hidden_layers"])


MOE: Names = merged(
    expert_names(),
    linear("moe.router.proj", "mlp.gate"),
    mlp_names("moe.shared", "mlp.shared_expert"),
    linear("moe.shared_gate", "mlp.shared_expert_gate"),
)

_MIXTRAL: Names = merged(
    stem_names(),
    pre_norm_names(),
    attention_names(),
    expert_names("block_sparse_moe.experts", ("w1", "w3", "w2")),
    linear("moe.router.proj", "block_sparse_moe.gate"),
)

FAMILIES = {
    "Qwen2ForCausalLM": Family(qwen2, LLAMA, "qwen2"),
    "Qwen2MoeForCausalLM": Family(qwen2_moe, merged(LLAMA, MOE), "qwen2_moe"),
    "Qwen3ForCausalLM": Family(qwen3, LLAMA, "qwen3"),
    "Qwen3MoeForCausalLM": Family(qwen3_moe, merged(LLAMA, MOE), "qwen3_moe"),
    "MixtralForCausalLM": Family(mixtral, _MIXTRAL, "mixtral"),
}
