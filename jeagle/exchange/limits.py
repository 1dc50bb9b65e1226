"""Finds out, before anything is written, what an engine cannot serve as it was trained.

The rules were read in vLLM 0.32.0 (model_executor/models/llama_eagle3.py, qwen3_eagle3.py,
transformers_utils/configs/speculators), SGLang 0.5.23 (srt/models/llama_eagle3.py, llama.py) and sglang-jax
(srt/models/llama_eagle3.py, llama.py, model_executor/model_runner.py). None of them reports a switch that it ignores: a
draft that breaks one of these rules loads, and fewer or none of its tokens are accepted.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec

Layout = Literal["plain", "speculators"]

ENGINE_VERSIONS = {"SGLang": "0.5.23", "vLLM": "0.32.0", "sglang-jax": "cddbf6f (21 August 2026)"}
"""The version of each engine whose source the rules were read in."""

_GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM")
WITHOUT_AUX_HIDDEN_STATES = {
    "SGLang": (*_GEMMA, "Glm4ForCausalLM", "GraniteForCausalLM", "MixtralForCausalLM", "Olmo2ForCausalLM"),
    "vLLM": (
        *(*_GEMMA, "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        *("Glm4ForCausalLM", "Glm4MoeForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"),
    ),
}
"""Architectures of targets that an engine serves, but whose aux hidden states it hands to no draft. An architecture
that is missing here is not refused: the engine may support it, or it may be new."""
SGLANG_JAX_TARGETS = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def check_spec(spec: DraftSpec, target_layers: int) -> None:
    """Checks that the draft makes sense for a target of `target_layers` decoder layers, whichever engine serves it.

    Raises:
      UserError: for aux layers that do not rise or do not exist, a draft vocabulary of a wrong size, two norms that
        exclude each other, or layer types that do not fit the number of layers or the sliding window.
    """
    aux_layers = list(spec.aux_layers)
    if not aux_layers or aux_layers != sorted(set(aux_layers)) or aux_layers[0] < 0 or aux_layers[-1] > target_layers:
        raise UserError(
            f"The draft's aux layers {aux_layers} must be layer boundaries from 0 to {target_layers}, in rising order, "
            "each one once."
        )
    if not 0 < spec.draft_vocab <= spec.target_vocab:
        raise UserError(
            f"The draft vocabulary has {spec.draft_vocab} entries; it needs at least one, and at most as many as the "
            f"target's vocabulary, {spec.target_vocab}."
        )
    if spec.norm_before_fc and spec.fc_norm:
        raise UserError("The draft has both norm_before_fc and fc_norm, which exclude each other: switch one off.")
    kinds = spec.layer_types
    if kinds and len(kinds) != spec.layers:
        raise UserError(f"The draft has {len(kinds)} layer_types for {spec.layers} layers: give one for each layer.")
    if kinds and ("sliding_attention" in kinds) != (spec.sliding_window > 0):
        raise UserError(
            f"The draft has sliding_window {spec.sliding_window} and layer_types {' '.join(kinds)}: a window above 0 "
            "and a layer with sliding_attention need each other."
        )


def sglang_limits(spec: DraftSpec, target_layers: int, architectures: Sequence[str] = ()) -> list[str]:
    """Returns the reasons why SGLang would not serve this draft as it was trained, as clauses; empty where it would.

    Args:
      target_layers: number of the target's decoder layers.
      architectures: of the target, where they are known.
    """
    rules = {
        "norm_before_residual is true, and its residual is always the raw feature": spec.norm_before_residual,
        f"aux_layers contains {target_layers}, and it captures before a layer, so never after the last one": (
            target_layers in spec.aux_layers
        ),
        "aux_layers contains 0, the embeddings, which would be layer id -1": 0 in spec.aux_layers,
        "qk_norm is true, and its draft has no norm on queries and keys": spec.qk_norm,
        "attention_bias is true, and its draft has no biases": spec.attention_bias,
        f"layers is {spec.layers}, and its draft has one": spec.layers != 1,
        f"sliding_window is {spec.sliding_window}, which it does not read from a draft's config": any(spec.windows),
    }
    return _broken("SGLang", spec, architectures, rules)


def vllm_limits(spec: DraftSpec, layout: Layout, architectures: Sequence[str] = ()) -> list[str]:
    """Returns the reasons why vLLM would not serve this draft as it was trained; see `sglang_limits`."""
    rules = {
        'qk_norm is true, which it reads only in the layout "speculators"': spec.qk_norm and layout == "plain",
        "qk_norm and attention_bias are both true, and it would drop the bias of o_proj": (
            spec.qk_norm and spec.attention_bias
        ),
    }
    return _broken("vLLM", spec, architectures, rules)


def sglang_jax_limits(spec: DraftSpec, target_layers: int, architectures: Sequence[str] = ()) -> list[str]:
    """Returns the reasons why sglang-jax, which reads the plain layout, would not serve this draft as it was trained.

    It looks for the layer ids in the target's configuration instead of the draft's, so that it always uses the default
    ones; its fc has room for three aux hidden states; it has none of EAGLE-3.1's norms; and it replaces the draft's
    embedding by the target's. For the arguments see `sglang_limits`.
    """
    default = (2, target_layers // 2, target_layers - 3)
    rules = {
        f"aux_layers is {list(spec.aux_layers)}, and it always uses {list(default)} of {target_layers} layers": (
            spec.aux_layers != default
        ),
        "norm_before_fc is true, which it does not support": spec.norm_before_fc,
        "fc_norm is true, which it does not support": spec.fc_norm,
        "carry_normed is true, and it carries the raw state": spec.carry_normed,
        f"width is {spec.width}, and it replaces the draft's embedding by the target's of width {spec.target_width}": (
            spec.width != spec.target_width
        ),
        f"the target is {', '.join(architectures)}, and it has aux hidden states of {' and '.join(SGLANG_JAX_TARGETS)} "
        "only": (bool(architectures) and not set(architectures) & set(SGLANG_JAX_TARGETS)),
    }
    shared = sglang_limits(dataclasses.replace(spec, aux_layers=(1,)), target_layers)
    return [reason for reason, broken in rules.items() if broken] + shared


def _broken(engine: str, spec: DraftSpec, architectures: Sequence[str], rules: dict[str, bool]) -> list[str]:
    refused = [name for name in architectures if name in WITHOUT_AUX_HIDDEN_STATES[engine]]
    shared = {f"the target is {name}, whose aux hidden states it hands to no draft": True for name in refused[:1]}
    shared["head_norm is false, and it always norms what lm_head reads"] = not spec.head_norm
    return [reason for reason, broken in (shared | rules).items() if broken]
