"""What an engine cannot serve, said before anything is written.

Read in vLLM 0.32.0 (model_executor/models/llama_eagle3.py, qwen3_eagle3.py, transformers_utils/configs/speculators),
SGLang 0.5.23 (srt/models/llama_eagle3.py, llama.py) and sglang-jax (srt/models/llama_eagle3.py, llama.py,
model_executor/model_runner.py). None of them reports a flag that it ignores: a draft that breaks one of these rules
loads, and is accepted less often or never.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec

Layout = Literal["plain", "speculators"]

READ_IN = {"SGLang": "0.5.23", "vLLM": "0.32.0", "sglang-jax": "cddbf6f (21 August 2026)"}
"""The version of each engine whose source the rules below were read in."""

_GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM")
NOT_TAPPED = {
    "SGLang": (*_GEMMA, "Glm4ForCausalLM", "GraniteForCausalLM", "MixtralForCausalLM", "Olmo2ForCausalLM"),
    "vLLM": (
        *(*_GEMMA, "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        *("Glm4ForCausalLM", "Glm4MoeForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"),
    ),
}
"""Architectures whose target model an engine has, without a way to hand a draft its inner hidden states. One that is
not named here is not refused: it may be tapped, or be new."""
TAPPED_BY_SGLANG_JAX = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def check_spec(spec: DraftSpec, target_layers: int) -> None:
    """UserError unless the spec makes sense for a target of so many layers, whatever serves it."""
    aux_layers = list(spec.aux_layers)
    if not aux_layers or aux_layers != sorted(set(aux_layers)) or aux_layers[0] < 0 or aux_layers[-1] > target_layers:
        raise UserError(
            f"The draft's taps {aux_layers} must be layer boundaries from 0 to {target_layers}, rising, each once."
        )
    if not 0 < spec.draft_vocab <= spec.target_vocab:
        raise UserError(
            f"The draft's vocabulary of {spec.draft_vocab} must have an entry, and no more than the target's of "
            f"{spec.target_vocab}."
        )
    if spec.norm_before_fc and spec.fc_norm:
        raise UserError("The draft has both norm_before_fc and fc_norm, which exclude each other: switch one off.")


def check_sglang(spec: DraftSpec, target_layers: int, architectures: Sequence[str] = ()) -> None:
    """UserError, naming SGLang and the flag, unless SGLang serves this draft as it was trained.

    Args:
      architectures: of the target, where they are known.
    """
    reasons = sglang_limits(spec, target_layers, architectures)
    elsewhere = "" if vllm_limits(spec, "speculators", architectures) else " vLLM can: export it for vLLM."
    if reasons:
        raise UserError(f"SGLang cannot serve this draft as it was trained: {'; '.join(reasons)}.{elsewhere}")


def check_vllm(spec: DraftSpec, layout: Layout, architectures: Sequence[str] = ()) -> None:
    """UserError, naming vLLM and the flag, unless vLLM serves this draft as it was trained; see `check_sglang`."""
    reasons = vllm_limits(spec, layout, architectures)
    elsewhere = "" if vllm_limits(spec, "speculators", architectures) else ' Choose the layout "speculators".'
    if reasons:
        raise UserError(f"vLLM cannot serve this draft as it was trained: {'; '.join(reasons)}.{elsewhere}")


def sglang_limits(spec: DraftSpec, target_layers: int, architectures: Sequence[str] = ()) -> list[str]:
    """Why SGLang would not serve this draft as it was trained, a clause for each reason; empty when it does."""
    reasons = {
        "norm_before_residual is true, and its residual is always the raw feature": spec.norm_before_residual,
        f"taps holds {target_layers}, and it captures before a layer, so never after the last one": (
            target_layers in spec.aux_layers
        ),
        "taps holds 0, the embeddings, which would be layer id -1": 0 in spec.aux_layers,
        "qk_norm is true, and its draft has no norm on queries and keys": spec.qk_norm,
        "attention_bias is true, and its draft has no biases": spec.attention_bias,
        f"layers is {spec.layers}, and its draft has one": spec.layers != 1,
        f"sliding_window is {spec.sliding_window}, which it does not take from a draft's config": (
            spec.sliding_window != 0
        ),
    }
    return _target("SGLang", architectures) + _no_head_norm(spec) + [r for r, holds in reasons.items() if holds]


def vllm_limits(spec: DraftSpec, layout: Layout, architectures: Sequence[str] = ()) -> list[str]:
    """Why vLLM would not serve this draft as it was trained, a clause for each reason; empty when it does."""
    reasons = {
        'qk_norm is true, which it takes only in the layout "speculators"': spec.qk_norm and layout == "plain",
        "qk_norm and attention_bias are both true, and it would drop the bias of o_proj": (
            spec.qk_norm and spec.attention_bias
        ),
    }
    return _target("vLLM", architectures) + _no_head_norm(spec) + [r for r, holds in reasons.items() if holds]


def sglang_jax_limits(spec: DraftSpec, target_layers: int, architectures: Sequence[str] = ()) -> list[str]:
    """Why sglang-jax, which reads the plain layout, would not serve this draft as it was trained.

    It looks for the layer ids in the target's configuration, not the draft's, so that the default ones are always
    tapped; its fc has room for three; it has none of EAGLE-3.1's norms, and puts the target's embedding in the draft.
    """
    usual = (2, target_layers // 2, target_layers - 3)
    reasons = {
        f"taps is {list(spec.aux_layers)}, and it always taps {list(usual)} of {target_layers} layers": spec.aux_layers
        != usual,
        "norm_before_fc is true, which it does not know": spec.norm_before_fc,
        "fc_norm is true, which it does not know": spec.fc_norm,
        "carry_normed is true, and it hands on the raw state": spec.carry_normed,
        f"width is {spec.width}, and it puts the target's embedding of width {spec.target_width} in the draft": (
            spec.width != spec.target_width
        ),
        f"the target is {', '.join(architectures)}, and it taps {' and '.join(TAPPED_BY_SGLANG_JAX)} alone": (
            bool(architectures) and not set(architectures) & set(TAPPED_BY_SGLANG_JAX)
        ),
    }
    shared = sglang_limits(dataclasses.replace(spec, aux_layers=(1,)), target_layers)
    return [reason for reason, holds in reasons.items() if holds] + shared


def _target(engine: str, architectures: Sequence[str]) -> list[str]:
    names = [name for name in architectures if name in NOT_TAPPED[engine]]
    return [f"the target is {names[0]}, whose hidden states it hands to no draft"] if names else []


def _no_head_norm(spec: DraftSpec) -> list[str]:
    return [] if spec.head_norm else ["head_norm is false, and it always norms what lm_head reads"]
