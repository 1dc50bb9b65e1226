"""Qwen 2, 2.5 and 3, dense and with experts, and Mixtral."""

from __future__ import annotations

from jeagle.targets.families.common import (
    LLAMA,
    Family,
    Names,
    Switches,
    attention_biases,
    attention_names,
    attention_spec,
    dense_spec,
    expert_names,
    linear,
    merged,
    mlp_names,
    pre_norm_names,
    sliding_windows,
    stem_names,
    target_spec,
)
from jeagle.targets.model.spec import BlockSpec, ExpertsSpec, RouterSpec, TargetSpec


def _windows(switches: Switches) -> list[int]:
    """The sliding window of each layer, 0 = none."""
    windowed, first = bool(switches.get("use_sliding_window", False)), switches.get("max_window_layers", 0)
    rule = lambda i: "sliding_attention" if windowed and i >= first else "full_attention"  # noqa: E731
    return [window * windowed for window in sliding_windows(switches, otherwise=rule)]


def qwen2(switches: Switches) -> TargetSpec:
    blocks = [
        BlockSpec(attention_spec(switches, qkv_bias=True, window=w), dense_spec(switches)) for w in _windows(switches)
    ]
    longest = switches["max_position_embeddings"]
    if chunks := switches.get("dual_chunk_attention_config"):  # Qwen2.5-1M has plain attention within the first chunk
        longest = min(longest, chunks["chunk_size"] - chunks["local_size"])
    return target_spec(switches, blocks, max_positions=longest)


def qwen3(switches: Switches) -> TargetSpec:
    biases = attention_biases(switches)
    mixers = [attention_spec(switches, qk_norm="head", window=window, **biases) for window in _windows(switches)]
    return target_spec(switches, [BlockSpec(mixer, dense_spec(switches)) for mixer in mixers])


def experts_of(switches: Switches, *, shared: bool) -> ExpertsSpec:
    """Qwen's experts; `shared` says whether every token goes through one more, gated MLP."""
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
    """Layers of which every `decoder_sparse_step`-th has experts, except for those in `mlp_only_layers`."""
    step, plain = switches.get("decoder_sparse_step", 1), set(switches.get("mlp_only_layers", ()))
    blocks = []
    for i, mixer in enumerate(mixers):
        if i not in plain and experts.count > 0 and (i + 1) % step == 0:
            blocks.append(BlockSpec(mixer, experts=experts))
        else:
            blocks.append(BlockSpec(mixer, dense_spec(switches)))
    return blocks


def qwen2_moe(switches: Switches) -> TargetSpec:
    bias = bool(switches.get("qkv_bias", True))
    mixers = [attention_spec(switches, qkv_bias=bias, window=w) for w in _windows(switches)]
    return target_spec(switches, sparse_blocks(switches, mixers, experts_of(switches, shared=True)))


def qwen3_moe(switches: Switches) -> TargetSpec:
    window = switches.get("sliding_window", 0) if switches.get("use_sliding_window") else 0
    mixer = attention_spec(switches, qk_norm="head", window=window, **attention_biases(switches))
    mixers = [mixer] * switches["num_hidden_layers"]
    return target_spec(switches, sparse_blocks(switches, mixers, experts_of(switches, shared=False)))


def mixtral(switches: Switches) -> TargetSpec:
    experts = ExpertsSpec(
        switches["num_local_experts"],
        switches["num_experts_per_tok"],
        switches["intermediate_size"],
        RouterSpec("softmax", renormalised=True),
        switches.get("hidden_act", "silu"),
    )
    mixer = attention_spec(switches, window=switches.get("sliding_window", 0))
    return target_spec(switches, [BlockSpec(mixer, experts=experts)] * switches["num_hidden_layers"])


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
