"""Opens a draft's config.json: checks the types of its fields, and brings each trainer's form into a common one.

    architectures                     written by                           common form
    LlamaForCausalLMEagle3,           SpecForge, SGLang, jeagle;           plain
    Eagle3LlamaForCausalLM            vLLM
    the same, eagle_config with       NVIDIA Model Optimizer               plain
    use_last_layernorm
    LlamaForCausalLM, and tensors     the authors of EAGLE                 plain
    of EAGLE-3
    LlamaEagle3DraftModel             NeMo AutoModel                       plain
    (speculators_model_type eagle3)   speculators                          speculators

Sources: the configurations and export code of SafeAILab/EAGLE (traineagle3), sgl-project/SpecForge,
NVIDIA/Model-Optimizer (hf_spec_export) and NVIDIA-NeMo/Automodel (speculative/eagle), August 2026; speculators 0.9.0.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jeagle.errors import UserError
from jeagle.exchange.config_read import NORM_OUTPUT_MEANS, Hints, check_supported_value, layout_of, spec_from_config
from jeagle.exchange.config_write import DECODER_SIZES, LAYER_IDS, NORM_SWITCHES, PLAIN_ARCHITECTURE
from jeagle.interfaces import DraftSpec


def parse_config(path: Path, *, name: str) -> dict[str, Any]:
    """Returns the content of a config.json whose fields have the types that all of their readers expect.

    Args:
      name: the file's name in error messages.

    Raises:
      UserError: for a file that is not a JSON object, or a field of a wrong type; the message names the field.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{name} must contain a JSON object, but it contains a {type(config).__name__}.")
    _check_field_types(config)
    return config


def _integer(value: Any) -> bool:
    return type(value) is int  # a bool, which is an int in Python, is a wrong value


def _above_0(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_SECTIONS = ("transformer_layer_config", "eagle_config", "rope_parameters", "rope_scaling")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "an object": (lambda v: isinstance(v, dict), " ".join(_SECTIONS)),
    "an integer": (_integer, "draft_vocab_size target_hidden_size num_aux_hidden_states"),
    "an integer above 0": (
        lambda v: _integer(v) and v > 0,
        f"original_max_position_embeddings {' '.join(DECODER_SIZES)}",
    ),
    "an integer of 0 or above": (lambda v: _integer(v) and v >= 0, "sliding_window"),
    "a number above 0": (_above_0, "rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow"),
    "a number of 0 or above": (
        lambda v: (v == 0 and not isinstance(v, bool)) or _above_0(v),
        "rms_norm_eps attention_factor attn_factor mscale mscale_all_dim",
    ),
    "true or false": (
        lambda v: isinstance(v, bool),  # the text "false" would count as true
        f"{' '.join(NORM_SWITCHES)} norm_output use_last_layernorm use_aux_hidden_state tie_word_embeddings "
        "attention_bias mlp_bias bias use_sliding_window truncate",
    ),
    "a string": (lambda v: isinstance(v, str), "rope_type type model_type hidden_act speculators_model_type"),
    "a list of strings": (_list_of(lambda v: isinstance(v, str)), "architectures layer_types"),
    "a list of integers": (_list_of(_integer), LAYER_IDS),
    "a list of numbers above 0": (_list_of(_above_0), "short_factor long_factor"),
    "an integer or a list of integers": (lambda v: _integer(v) or _list_of(_integer)(v), "eos_token_id"),
}
"""What the value of a field must be, in words and in code, and the fields."""


def _check_field_types(config: Mapping[str, Any]) -> None:
    """Raises UserError for a value that not every reader of the field expects; null counts as a missing field."""
    for wanted, (holds, fields) in _RULES.items():
        for name in fields.split():
            value = config.get(name)
            if value is not None and not holds(value):
                raise UserError(f"config.json has {name} {value!r}; it must be {wanted}.")
    for name in _SECTIONS:
        if config.get(name):
            _check_field_types(config[name])


def to_common_form(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns a copy of `config` in a common form; `config_read` refuses what no known trainer writes.

    Args:
      shapes: of the tensors in the same folder, by canonical torch name.

    Raises:
      UserError: for a draft of a known trainer that jeagle does not support. The message names the field.
    """
    architectures, nested = config.get("architectures") or [], config.get("eagle_config") or {}
    if config.get("speculators_model_type") is not None:
        return dict(config)
    if "LlamaEagle3DraftModel" in architectures:
        # NeMo AutoModel copies the target's configuration and changes some fields: the others are the target's. Its
        # draft is one Llama layer that attends to the whole sequence; its `norm_output` is that of the carried state.
        if config.get("parallel_drafting") or "mask_hidden" in shapes:
            raise UserError("config.json has parallel_drafting: jeagle does not support such a draft (P-EAGLE).")
        of_the_target = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
        own = {name: value for name, value in config.items() if name not in of_the_target}
        as_plain = {"architectures": [PLAIN_ARCHITECTURE], "model_type": "llama", "num_hidden_layers": 1}
        return own | as_plain | {NORM_OUTPUT_MEANS: "carry"}
    if "LlamaForCausalLM" in architectures and "layers.0.hidden_norm.weight" in shapes:
        return config | {"architectures": [PLAIN_ARCHITECTURE]}
    if "use_last_layernorm" in nested:
        supported = {
            "use_input_layernorm_in_first_layer": (True, None),
            "use_mtp_layernorm": (False, None),
            "next_layer_regular": (True, None),
            "parallel_draft_step": (0, 1, None),
        }
        for name, values in supported.items():
            check_supported_value(f"eagle_config.{name}", nested.get(name), values)
        last = nested["use_last_layernorm"]
        return config | ({} if last is None else {"norm_output": bool(last), NORM_OUTPUT_MEANS: "head"})
    return dict(config)


def read_draft_config(
    path: str | Path,
    *,
    draft_vocab: int,
    target_width: int,
    default_aux_layers: Callable[[], tuple[int, ...]],
    norm_output: Literal["carry", "head"] = "head",
) -> DraftSpec:
    """Returns the draft that a configuration without tensors describes: SpecForge's or speculators' JSON file.

    Args:
      draft_vocab, target_width, default_aux_layers: the values where the file does not say them. A missing head_dim is
        hidden_size / heads.
      norm_output: what the field means in SpecForge's form, see `Hints`; SpecForge reads it as "head".

    Raises:
      UserError: for a file that is missing or is no such configuration, or fields that jeagle's draft does not support.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--draft.json {path} is not a file: give a draft's configuration, or leave the flag out.")
    config = parse_config(path, name=f"--draft.json {path}")
    decoder = config
    if layout_of(config) == "plain":
        config["tie_word_embeddings"] = False  # as SpecForge sets it, whatever its file says
    else:
        decoder = config["transformer_layer_config"] = dict(config.get("transformer_layer_config") or {})
    if not decoder.get("head_dim") and decoder.get("hidden_size") and decoder.get("num_attention_heads"):
        decoder["head_dim"] = decoder["hidden_size"] // decoder["num_attention_heads"]
    config["draft_vocab_size"] = config.get("draft_vocab_size") or draft_vocab
    config["target_hidden_size"] = config.get("target_hidden_size") or target_width
    has_layer_ids = config.get(LAYER_IDS) or (config.get("eagle_config") or {}).get(LAYER_IDS)
    return spec_from_config(config, {}, Hints(None if has_layer_ids else default_aux_layers(), norm_output))
