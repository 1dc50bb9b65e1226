"""FLOPs that a target's forward pass cannot do without, by hand from its config.json; a multiply-add is two."""

from __future__ import annotations

from typing import Any

from benchmarks.tpu_shapes import Case, Chip
from jeagle.layers.splash import BLOCK

KERNEL_SHARE = 0.5  # of peak: what attention kernels of this kind are said to reach; none was run


def needed_flops(config: dict[str, Any], rows: int, length: int) -> float:
    """Of rows x length tokens, one document a row: each token's projections, chosen experts and visible keys, and the
    logits of every position."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    projections = 2 * width * (queries + 2 * keys) + 2 * queries * width
    if experts := _experts(config):
        feed_forward = 2 * width * experts + config["num_experts_per_tok"] * 6 * width * _inner(config)
    else:
        feed_forward = 6 * width * _inner(config)
    kinds = config.get("layer_types", ["full_attention"] * layers)
    windows = [config["sliding_window"] if kind == "sliding_attention" else length for kind in kinds]
    seen = sum(sum(min(place + 1, window) for place in range(length)) / length for window in windows)
    per_token = layers * (projections + feed_forward) + 4 * queries * seen + 2 * width * config["vocab_size"]
    return float(rows * length * per_token)


def expert_seconds(config: dict[str, Any], case: Case, chips: int, expert_parts: int, chip: Chip) -> float:
    """The experts' ragged products, a kernel for which the compiler has no cycles: FLOPs or bytes, what takes longer.

    Tokens spread evenly over the experts; each chip reads the kernels of its own ones once.
    """
    count, width, inner = _experts(config), config["hidden_size"], _inner(config)
    if not count:
        return 0.0
    tokens = case.rows * case.length * config["num_experts_per_tok"] / chips
    flops = tokens * 6 * width * inner
    weights, states = 2 * 3 * width * inner * count / expert_parts, tokens * (3 * 2 * width + 4 * (2 * inner + width))
    return config["num_hidden_layers"] * max(flops / chip.flops, (weights + states) / chip.bandwidth)


def attention_seconds(config: dict[str, Any], case: Case, chips: int, chip: Chip) -> float:
    """Attention's kernel, of which the compiler knows no cycles either: two products with every block of keys that a
    block of queries sees some of, at `KERNEL_SHARE` of the chip's peak."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    ends = range(BLOCK, case.length + 1, BLOCK)
    seen = 0
    for kind in config.get("layer_types", ["full_attention"] * config["num_hidden_layers"]):
        window = config["sliding_window"] if kind == "sliding_attention" else case.length
        seen += sum(end - max(end - BLOCK - window + 1, 0) // BLOCK * BLOCK for end in ends) * BLOCK
    return 4 * config["num_attention_heads"] * head * seen * case.rows / chips / (KERNEL_SHARE * chip.flops)


def _experts(config: dict[str, Any]) -> int:
    return config.get("num_experts") or config.get("num_local_experts") or 0


def _inner(config: dict[str, Any]) -> int:
    return config.get("moe_intermediate_size") or config["intermediate_size"]
