"""Makes the config.json that engines read, in one of two layouts.

plain: one flat configuration like Llama's, which SGLang and vLLM load from the same folder.
speculators: a configuration of the speculators library that contains that of the decoder layers; only vLLM loads it.

An aux layer L means "after L decoder layers". vLLM reads the `eagle_aux_hidden_state_layer_ids` at the top level as L;
SGLang reads the ids nested in `eagle_config` and adds one. The plain layout writes both, L and L - 1, so that both
engines collect the same hidden states.
"""

from typing import Any

import jeagle
from jeagle.exchange.card import Export

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
PLAIN_ARCHITECTURE = "LlamaForCausalLMEagle3"
WRITTEN_BY = "jeagle_version"
"""Marks a plain config.json as jeagle's: its `norm_output` has the engines' meaning, which differs from SpecForge's."""
DECODER_SIZES = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "target_vocab",
    "max_position_embeddings": "max_positions",
}
"""Sizes of the decoder layers: from config.json's name to that of `DraftSpec`."""
NORM_SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm")
"""Switches of the same name in config.json and in `DraftSpec`."""


def config_json(export: Export) -> dict[str, Any]:
    """Returns the config.json of an export, in its layout.

    plain: `norm_output` is written only where the normed state is carried. Engines read a missing one as false, while
    SpecForge would read false as "no norm before lm_head".

    speculators: the number of aux layers stands in `transformer_layer_config`. vLLM's Llama draft looks for it there,
    and otherwise assumes three, whatever the list of layer ids contains. The verifier is the target that vLLM loads
    when it is given the draft's folder as the model.
    """
    spec, card = export.spec, export.card
    written_by = {WRITTEN_BY: jeagle.__version__, "dtype": export.dtype}
    scaling = {name: list(v) if isinstance(v, tuple) else v for name, v in spec.rope.scaling}
    ends, window = list(spec.end_token_ids), max(spec.windows)
    decoder = {
        **{field: getattr(spec, name) for field, name in DECODER_SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention_bias,
        "mlp_bias": False,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "num_aux_hidden_states": len(spec.aux_layers),
        "tie_word_embeddings": False,
        "rope_theta": spec.rope.theta,  # as transformers 4 reads it; rope_parameters are of transformers 5
        **({"rope_scaling": scaling} if scaling else {}),
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": spec.rope.theta},
    }
    attention = {
        "layer_types": ["sliding_attention" if width else "full_attention" for width in spec.windows],
        "sliding_window": window or None,
        "use_sliding_window": window > 0,
    }
    fusion = {
        "draft_vocab_size": spec.draft_vocab,
        "target_hidden_size": spec.target_width,
        LAYER_IDS: list(spec.aux_layers),
        **{name: getattr(spec, name) for name in NORM_SWITCHES},
        "tie_word_embeddings": False,
    }
    if export.layout == "plain":
        return {
            "architectures": [PLAIN_ARCHITECTURE],
            "model_type": "llama",
            **written_by,
            "torch_dtype": export.dtype,
            **decoder,
            **(attention if window else {}),
            **fusion,
            **({"norm_output": True} if spec.carry_normed else {}),
            "eagle_config": {LAYER_IDS: [layer - 1 for layer in spec.aux_layers], "use_aux_hidden_state": True},
        }
    proposal = {"proposal_type": "greedy", "speculative_tokens": card.speculative_tokens}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        **written_by,
        **fusion,
        "norm_output": spec.carry_normed,
        "transformer_layer_config": {
            "model_type": "qwen3" if spec.qk_norm else "llama",
            **decoder,
            **attention,
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": card.target_ref, "architectures": list(card.target_architectures)},
        },
    }
