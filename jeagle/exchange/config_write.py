"""DraftSpec -> the config.json that engines read, in two layouts.

plain: one flat Llama-like configuration, which SGLang and vLLM both load from the same folder.
speculators: the decoder layer's configuration within one of the speculators library; vLLM only.

A tap L means "after L decoder layers". vLLM reads the top-level `eagle_aux_hidden_state_layer_ids` as L; SGLang reads
those nested in `eagle_config`, and adds one. The plain layout writes both, L and L - 1: both engines tap the same
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jeagle
from jeagle.interfaces import DraftSpec, Rope

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
PLAIN_ARCHITECTURE = "LlamaForCausalLMEagle3"
WRITTEN_BY = "jeagle_version"
"""Marks a plain config.json as ours, in which `norm_output` has the engines' meaning; SpecForge's is another."""
_SPECULATORS_FORMAT = "0.9.0"


def plain_config(spec: DraftSpec, *, dtype: str) -> dict[str, Any]:
    """The flat layout.

    `norm_output` is written only where the normed state is carried: engines read its absence as false, while SpecForge
    would read false as "no norm before lm_head".

    Args:
      spec: one that `limits` lets pass.
      dtype: of the stored tensors, as torch calls it; engines take their own.
    """
    carried = {"norm_output": True} if spec.carry_normed else {}
    return {
        "architectures": [PLAIN_ARCHITECTURE],
        "model_type": "llama",
        WRITTEN_BY: jeagle.__version__,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_decoder(spec),
        **(_window(spec) if spec.sliding_window else {}),
        **_fusion(spec),
        **carried,
        "eagle_config": {LAYER_IDS: [tap - 1 for tap in spec.aux_layers], "use_aux_hidden_state": True},
    }


def speculators_config(
    spec: DraftSpec, *, dtype: str, verifier: str, architectures: Sequence[str], speculative_tokens: int
) -> dict[str, Any]:
    """The layout of the speculators library.

    The number of taps stands within `transformer_layer_config`: vLLM's Llama draft looks for it there and else assumes
    three, whatever the list of layer ids says.

    Args:
      spec: one that `limits` lets pass.
      dtype: of the stored tensors, as torch calls it; vLLM takes the target's.
      verifier: the target that vLLM loads when the draft's folder is given as its model.
      architectures: of the target; may be empty.
      speculative_tokens: tokens drafted before each verification, unless vLLM's command says otherwise.
    """
    model_type = "qwen3" if spec.qk_norm else "llama"
    proposal = {"proposal_type": "greedy", "speculative_tokens": speculative_tokens}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_FORMAT,
        WRITTEN_BY: jeagle.__version__,
        "dtype": dtype,
        **_fusion(spec),
        "norm_output": spec.carry_normed,
        "transformer_layer_config": {"model_type": model_type, **_decoder(spec), **_window(spec)},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": verifier, "architectures": list(architectures)},
        },
    }


def _decoder(spec: DraftSpec) -> dict[str, Any]:
    """What both layouts say of the decoder layers, RoPE under the names of transformers 4 and 5."""
    ends = list(spec.end_token_ids)
    return {
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention_bias,
        "mlp_bias": False,
        "vocab_size": spec.target_vocab,
        "max_position_embeddings": spec.max_positions,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "num_aux_hidden_states": len(spec.aux_layers),
        "tie_word_embeddings": False,
        **_rope(spec.rope),
    }


def _fusion(spec: DraftSpec) -> dict[str, Any]:
    """What both layouts say at the top level of taps, vocabulary and norms."""
    return {
        "draft_vocab_size": spec.draft_vocab,
        "target_hidden_size": spec.target_width,
        LAYER_IDS: list(spec.aux_layers),
        "norm_before_residual": spec.norm_before_residual,
        "norm_before_fc": spec.norm_before_fc,
        "fc_norm": spec.fc_norm,
        "tie_word_embeddings": False,
    }


def _window(spec: DraftSpec) -> dict[str, Any]:
    kind = "sliding_attention" if spec.sliding_window else "full_attention"
    return {
        "layer_types": [kind] * spec.layers,
        "sliding_window": spec.sliding_window or None,
        "use_sliding_window": bool(spec.sliding_window),
    }


def _rope(rope: Rope) -> dict[str, Any]:
    scaling = {name: list(v) if isinstance(v, tuple) else v for name, v in rope.scaling}
    old = {"rope_theta": rope.theta, "rope_scaling": scaling} if scaling else {"rope_theta": rope.theta}
    return {**old, "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": rope.theta}}
