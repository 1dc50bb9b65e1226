"""What kind of value each field of a draft's config.json has, checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jeagle.errors import UserError
from jeagle.exchange.config_write import LAYER_IDS

_SECTIONS = ("transformer_layer_config", "eagle_config", "rope_parameters", "rope_scaling")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_SECTIONS, ((dict,), "an object")),
    **dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "draft_vocab_size", "target_hidden_size", "max_position_embeddings"),
            *("num_aux_hidden_states", "sliding_window", "original_max_position_embeddings"),
        ),
        ((int,), "a whole number"),
    ),
    **dict.fromkeys(
        (
            *("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
            *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attn_factor"),
        ),
        ((int, float), "a number"),
    ),
    **dict.fromkeys(
        (
            *("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "use_last_layernorm"),
            *("attention_bias", "mlp_bias", "bias", "tie_word_embeddings", "use_sliding_window", "truncate"),
            "use_aux_hidden_state",
        ),
        ((bool,), "true or false"),  # "false" in quotes is true
    ),
    **dict.fromkeys(("rope_type", "type", "model_type", "hidden_act", "speculators_model_type"), ((str,), "a text")),
}
_LISTS: dict[str, tuple[type, ...]] = {
    "architectures": (str,),
    "layer_types": (str,),
    LAYER_IDS: (int,),
    "short_factor": (int, float),
    "long_factor": (int, float),
}


_ABOVE_0 = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("original_max_position_embeddings", "short_factor", "long_factor"),
)
_NOT_BELOW_0 = ("rms_norm_eps", "sliding_window", "attention_factor", "attn_factor", "mscale", "mscale_all_dim")


def check_kinds(config: Mapping[str, Any]) -> None:
    """UserError, naming the field, where a value is of another kind than every reader of it takes; null is missing."""
    for name, value in config.items():
        if value is None:
            continue
        if name in _KINDS and not _is(value, _KINDS[name][0]):
            raise UserError(f"config.json has {name} {value!r}; it is {_KINDS[name][1]}.")
        if name in _LISTS and not (isinstance(value, list) and all(_is(entry, _LISTS[name]) for entry in value)):
            what = "texts" if str in _LISTS[name] else "numbers"
            raise UserError(f"config.json has {name} {value!r}; it is a list of {what}.")
        if name == "eos_token_id" and not all(_is(entry, (int,)) for entry in _entries(value)):
            raise UserError(f"config.json has {name} {value!r}; it is a whole number, or a list of them.")
        if name in _ABOVE_0 and not all(0 < entry < math.inf for entry in _entries(value)):
            raise UserError(f"config.json has {name} {value!r}; it must be above 0, and finite.")
        if name in _NOT_BELOW_0 and not all(0 <= entry < math.inf for entry in _entries(value)):
            raise UserError(f"config.json has {name} {value!r}; it must be 0 or above, and finite.")
        if name in _SECTIONS:
            check_kinds(value)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))  # a number to Python


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
