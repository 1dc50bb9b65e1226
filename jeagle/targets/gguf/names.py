"""Which tensors of a GGUF make up each tensor of a Hugging Face checkpoint, one table an architecture.

A table maps Hugging Face's name ({i} a layer, {e} an expert) to a `Recipe`: the GGUF tensors it is made of, and how.
Source: gguf's tensor_mapping.py and llama.cpp's convert_hf_to_gguf.py, whose changes the recipes undo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.gguf.reader import Stored
from jeagle.targets.quantised.views import (
    AsRow,
    Flattened,
    Interleaved,
    Joined,
    Mapped,
    Picked,
    Reordered,
    Swapped,
    View,
)


class Recipe(NamedTuple):
    """How a tensor is made.

    Attributes:
      sources: GGUF names; where one of them is missing, so is the tensor.
      make: (views of the sources, config.json, expert or None) -> the tensor.
    """

    sources: tuple[str, ...]
    make: Callable[[list[Stored], Mapping[str, Any], int], View]


def _as_is(name: str) -> Recipe:
    return Recipe((name,), lambda views, config, e: views[0])


def _expert(name: str) -> Recipe:
    return Recipe((name,), lambda views, config, e: Picked(views[0], e))


def _minus_one(name: str) -> Recipe:
    """Gemma's norms multiply by 1 + weight; the converter stores the sum."""
    return Recipe((name,), lambda views, config, e: Mapped(views[0], lambda weight: weight - 1))


def _halves(name: str, heads: str) -> Recipe:
    """Rows of each head in the order that rotates halves.

    llama.cpp rotates neighbouring pairs (0,1), (2,3), ... in these architectures, Hugging Face (0,d/2), (1,d/2+1), ...:
    the converter interleaves the two halves of each head's rows.
    """

    def make(views: list[Stored], config: Mapping[str, Any], e: int) -> View:
        rows, expected = views[0].shape[0], config[heads] * config["head_dim"]
        if rows != expected:
            raise UserError(
                f"The tensor {views[0].blocks.name} in {views[0].blocks.path} has {rows} rows, but the file's metadata "
                f"makes it {expected}."
            )
        return Reordered(views[0], np.arange(rows).reshape(config[heads], -1, 2).swapaxes(1, 2).reshape(-1))

    return Recipe((name,), make)


_EMBEDDINGS = {
    "model.embed_tokens.weight": _as_is("token_embd.weight"),
    "lm_head.weight": _as_is("output.weight"),
    "model.norm.weight": _as_is("output_norm.weight"),
}
_L, _B = "model.layers.{i}.", "blk.{i}."
_NORMS = {
    _L + "input_layernorm.weight": _as_is(_B + "attn_norm.weight"),
    _L + "post_attention_layernorm.weight": _as_is(_B + "ffn_norm.weight"),
}
_POST_NORMS = {
    _L + "post_attention_layernorm.weight": _as_is(_B + "post_attention_norm.weight"),
    _L + "post_feedforward_layernorm.weight": _as_is(_B + "post_ffw_norm.weight"),
}
_OUT = {
    _L + f"self_attn.{new}_proj.{kind}": _as_is(_B + f"attn_{old}.{kind}")
    for old, new in (("v", "v"), ("output", "o"))
    for kind in ("weight", "bias")
}
_ATTENTION = _OUT | {
    _L + f"self_attn.{new}_proj.{kind}": _as_is(_B + f"attn_{new}.{kind}")
    for new in ("q", "k")
    for kind in ("weight", "bias")
}
_PAIRED_ATTENTION = _OUT | {
    _L + f"self_attn.{new}_proj.{kind}": _halves(_B + f"attn_{new}.{kind}", heads)
    for new, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in ("weight", "bias")
}
_QK_NORM = {_L + f"self_attn.{new}_norm.weight": _as_is(_B + f"attn_{new}_norm.weight") for new in ("q", "k")}
_MLP = {
    _L + f"mlp.{new}_proj.{kind}": _as_is(_B + f"ffn_{new}.{kind}")
    for new in ("gate", "up", "down")
    for kind in ("weight", "bias")
}
_FUSED_MLP = {
    _L + "mlp.gate_up_proj.weight": _as_is(_B + "ffn_up.weight"),
    _L + "mlp.down_proj.weight": _as_is(_B + "ffn_down.weight"),
}
_EXPERTS = {_L + "mlp.gate.weight": _as_is(_B + "ffn_gate_inp.weight")} | {
    _L + f"mlp.experts.{{e}}.{new}_proj.weight": _expert(_B + f"ffn_{new}_exps.weight")
    for new in ("gate", "up", "down")
}
_BIASED_EXPERTS = _EXPERTS | {_L + "mlp.gate.e_score_correction_bias": _as_is(_B + "exp_probs_b.bias")}
_MIXTRAL_EXPERTS = {_L + "block_sparse_moe.gate.weight": _as_is(_B + "ffn_gate_inp.weight")} | {
    _L + f"block_sparse_moe.experts.{{e}}.{new}.weight": _expert(_B + f"ffn_{old}_exps.weight")
    for new, old in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}


def _shared(name: str) -> dict[str, Recipe]:
    return {
        _L + f"mlp.{name}.{new}_proj.weight": _as_is(_B + f"ffn_{new}_shexp.weight") for new in ("gate", "up", "down")
    }


_QWEN2_SHARED = _shared("shared_expert") | {
    _L + "mlp.shared_expert_gate.weight": Recipe(
        (_B + "ffn_gate_inp_shexp.weight",), lambda views, config, e: AsRow(views[0])
    )
}


def _key_and_value(views: list[Stored], config: Mapping[str, Any], e: int) -> View:
    """MLA's kv_b: for each head its nope keys' rows, then its values'; the file keeps the keys' part transposed."""
    return Flattened(Joined([Swapped(views[0]), views[1]], axis=1))


_MLA = {
    _L + f"self_attn.{new}.weight": _as_is(_B + f"attn_{old}.weight")
    for new, old in (
        ("q_proj", "q"),
        ("q_a_proj", "q_a"),
        ("q_a_layernorm", "q_a_norm"),
        ("q_b_proj", "q_b"),
        ("kv_a_proj_with_mqa", "kv_a_mqa"),
        ("kv_a_layernorm", "kv_a_norm"),
        ("o_proj", "output"),
    )
} | {_L + "self_attn.kv_b_proj.weight": Recipe((_B + "attn_k_b.weight", _B + "attn_v_b.weight"), _key_and_value)}

_GPT_OSS_MLP = {
    _L + "mlp.router.weight": _as_is(_B + "ffn_gate_inp.weight"),
    _L + "mlp.router.bias": _as_is(_B + "ffn_gate_inp.bias"),
    _L + "mlp.experts.gate_up_proj": Recipe(
        (_B + "ffn_gate_exps.weight", _B + "ffn_up_exps.weight"),
        lambda views, config, e: Interleaved([Swapped(view) for view in views]),
    ),
    _L + "mlp.experts.gate_up_proj_bias": Recipe(
        (_B + "ffn_gate_exps.bias", _B + "ffn_up_exps.bias"), lambda views, config, e: Interleaved(views)
    ),
    _L + "mlp.experts.down_proj": Recipe((_B + "ffn_down_exps.weight",), lambda views, config, e: Swapped(views[0])),
    _L + "mlp.experts.down_proj_bias": _as_is(_B + "ffn_down_exps.bias"),
}


def _zero_centred(names: dict[str, Recipe]) -> dict[str, Recipe]:
    """The same table with every norm's stored weight less one."""
    return {new: _minus_one(made.sources[0]) if new.endswith("norm.weight") else made for new, made in names.items()}


_GEMMA2 = {
    _L + "input_layernorm.weight": _as_is(_B + "attn_norm.weight"),
    _L + "pre_feedforward_layernorm.weight": _as_is(_B + "ffn_norm.weight"),
    **_EMBEDDINGS,
    **_POST_NORMS,
    **_ATTENTION,
    **_MLP,
}
_LLAMA = _EMBEDDINGS | _NORMS | _PAIRED_ATTENTION | _MLP
_QWEN2 = _EMBEDDINGS | _NORMS | _ATTENTION | _MLP

NAMES: dict[str, dict[str, Recipe]] = {
    "deepseek2": _EMBEDDINGS | _NORMS | _MLA | _MLP | _BIASED_EXPERTS | _shared("shared_experts"),
    "gemma": _zero_centred(_QWEN2),
    "gemma2": _zero_centred(_GEMMA2),
    "gemma3": _zero_centred(_GEMMA2 | _QK_NORM),
    "glm4": {
        _L + "post_self_attn_layernorm.weight": _as_is(_B + "post_attention_norm.weight"),
        _L + "post_mlp_layernorm.weight": _as_is(_B + "post_ffw_norm.weight"),
        **_EMBEDDINGS,
        **_NORMS,
        **_ATTENTION,
        **_FUSED_MLP,
    },
    "glm4moe": {
        **_QWEN2,
        **_QK_NORM,
        **_BIASED_EXPERTS,
        **_shared("shared_experts"),
        _L + "post_attention_layernorm.weight": _as_is(_B + "post_attention_norm.weight"),
    },
    "gpt-oss": {
        **_EMBEDDINGS,
        **_ATTENTION,
        **_GPT_OSS_MLP,
        _L + "input_layernorm.weight": _as_is(_B + "attn_norm.weight"),
        _L + "post_attention_layernorm.weight": _as_is(_B + "post_attention_norm.weight"),
        _L + "self_attn.sinks": _as_is(_B + "attn_sinks.weight"),
    },
    "granite": _LLAMA,
    "llama": _LLAMA | _MIXTRAL_EXPERTS,
    "mistral3": _LLAMA,
    "olmo2": _EMBEDDINGS | _POST_NORMS | _ATTENTION | _QK_NORM | _MLP,
    "phi3": {
        _L + "self_attn.qkv_proj.weight": _as_is(_B + "attn_qkv.weight"),
        _L + "self_attn.o_proj.weight": _as_is(_B + "attn_output.weight"),
        **_EMBEDDINGS,
        **_NORMS,
        **_FUSED_MLP,
    },
    "qwen2": _QWEN2,
    "qwen2moe": _QWEN2 | _EXPERTS | _QWEN2_SHARED,
    "qwen3": _QWEN2 | _QK_NORM,
    "qwen3moe": _QWEN2 | _QK_NORM | _EXPERTS,
    "smollm3": _LLAMA,
}
# Read into the configuration, not as weights.
CONFIGURING = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
