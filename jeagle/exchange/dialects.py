"""config.json of each trainer -> one of two common forms, which `config_read` understands.

    architectures                     who writes it                        form
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

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jeagle.errors import UserError
from jeagle.exchange.config_read import NORM_OUTPUT_MEANS
from jeagle.exchange.config_write import PLAIN_ARCHITECTURE

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


def as_common(config: Config, shapes: Shapes) -> Config:
    """A copy of `config` in a common form; one of no known dialect as it is, for `config_read` to refuse.

    Args:
      shapes: of the tensors beside it, by canonical name.

    Raises:
      UserError: naming the field, for a draft of a known dialect that is no EAGLE-3 as jeagle has it.
    """
    architectures = config.get("architectures") or []
    if config.get("speculators_model_type") is not None:
        return dict(config)
    if "LlamaEagle3DraftModel" in architectures:
        return _automodel(config, shapes)
    if "LlamaForCausalLM" in architectures and "layers.0.hidden_norm.weight" in shapes:
        return config | {"architectures": [PLAIN_ARCHITECTURE]}
    if "use_last_layernorm" in (config.get("eagle_config") or {}):
        return _model_optimizer(config)
    return dict(config)


_OF_THE_TARGET = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")


def _automodel(config: Config, shapes: Shapes) -> Config:
    """NeMo AutoModel copies the target's configuration and changes some fields: what else stands there is the target's.

    Its draft is a Llama layer whatever the target's model_type, sees the whole sequence, and is one layer while
    num_hidden_layers is still the target's. Its `norm_output` means that the normed state is carried.
    """
    if config.get("parallel_drafting") or "mask_hidden" in shapes:
        raise UserError("config.json has parallel_drafting: such a draft (P-EAGLE) is not one that jeagle runs.")
    own = {name: value for name, value in config.items() if name not in _OF_THE_TARGET}
    as_plain = {"architectures": [PLAIN_ARCHITECTURE], "model_type": "llama", "num_hidden_layers": 1}
    return own | as_plain | {NORM_OUTPUT_MEANS: "carry"}


_MODEL_OPTIMIZER_ONLY = {
    "use_input_layernorm_in_first_layer": (True, None),
    "use_mtp_layernorm": (False, None),
    "next_layer_regular": (True, None),
    "parallel_draft_step": (0, 1, None),
}
"""What jeagle's draft has of Model Optimizer's switches."""


def _model_optimizer(config: Config) -> Config:
    nested = config["eagle_config"]
    for name, known in _MODEL_OPTIMIZER_ONLY.items():
        if nested.get(name) not in known:
            raise UserError(f"config.json has eagle_config.{name} {nested[name]}; jeagle's draft has no such thing.")
    last = nested["use_last_layernorm"]
    return config | ({} if last is None else {"norm_output": bool(last), NORM_OUTPUT_MEANS: "head"})
