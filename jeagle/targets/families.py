"""Target families: how each reads its config.json and what its weights are called.

Adding a family is one entry in `FAMILIES` and one golden test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jeagle.errors import UserError
from jeagle.joints import Rope
from jeagle.targets.spec import TargetSpec


@dataclasses.dataclass(frozen=True)
class Family:
    """A literal description of a family.

    Attributes:
      read: config.json -> TargetSpec; refuses what it does not honour, by name.
      names: parameter path of `Decoder` -> Hugging Face name; {i} is the layer. Kernels lie transposed there.
    """

    read: Callable[[dict[str, Any]], TargetSpec]
    names: dict[str, str]


def read_spec(config: dict[str, Any]) -> TargetSpec:
    """The TargetSpec of a config.json. UserError for an unknown architecture or a switch that is not honoured."""
    return family_of(config).read(config)


def family_of(config: dict[str, Any]) -> Family:
    architectures = config.get("architectures") or ["(none given)"]
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(
        f"The target's architecture {architectures[0]} is not supported; these are: {', '.join(sorted(FAMILIES))}."
    )


def rope_of(config: dict[str, Any]) -> Rope:
    """RoPE from either schema: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(float(theta))
    scaling["rope_type"] = kind
    scaling.pop("type", None)
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return Rope(float(theta), tuple(sorted(scaling.items())))


def _llama(config: dict[str, Any]) -> TargetSpec:
    _refuse(config, hidden_act={"silu"}, mlp_bias={False}, sliding_window={None}, partial_rotary_factor={1})
    heads = config["num_attention_heads"]
    ends = config.get("eos_token_id")
    return TargetSpec(
        architecture="LlamaForCausalLM",
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope_of(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        max_positions=config.get("max_position_embeddings", 2048),
        end_token_ids=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
    )


def _refuse(config: dict[str, Any], **honoured: set[Any]) -> None:
    for switch, values in honoured.items():
        value = config.get(switch, next(iter(values)))
        if value not in values:
            raise UserError(
                f"The target's config.json has {switch} = {value!r}, which changes its numbers and is not supported "
                f"for {config['architectures'][0]} (supported: {', '.join(map(repr, values))})."
            )


_LLAMA_NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layers.input_layernorm": "model.layers.{i}.input_layernorm.weight",
    "layers.post_attention_layernorm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.attention.q_proj": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.attention.k_proj": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.attention.v_proj": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.attention.o_proj": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.attention.q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.attention.k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.attention.v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.attention.o_bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers.mlp.gate_proj": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.mlp.up_proj": "model.layers.{i}.mlp.up_proj.weight",
    "layers.mlp.down_proj": "model.layers.{i}.mlp.down_proj.weight",
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_llama, _LLAMA_NAMES),
}
