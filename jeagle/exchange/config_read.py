"""config.json -> DraftSpec, in either layout; where two readers would disagree on a field, it is refused by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from jeagle.errors import UserError
from jeagle.exchange.config_write import LAYER_IDS, PLAIN_ARCHITECTURE, WRITTEN_BY
from jeagle.exchange.limits import Layout
from jeagle.exchange.rope_read import rope_of
from jeagle.interfaces import DraftSpec

NormOutput = Literal["carry", "head"]
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
NORM_OUTPUT_MEANS = "norm_output_means"
"""Added to a plain config.json by `dialects` where the trainer that wrote it is known."""
_ARCHITECTURES = (PLAIN_ARCHITECTURE, "Eagle3LlamaForCausalLM")


@dataclasses.dataclass(frozen=True)
class Hints:
    """What to take where a config.json leaves a question open; one that answers it must not disagree.

    Attributes:
      taps: layer boundaries, where no layer ids are given, or two lists contradict each other.
      norm_before_residual: where speculators' form is silent about it.
      norm_output: what a plain config.json that jeagle did not write means by it. "carry", as engines read it: the
        state handed to the next step is normed. "head", as SpecForge reads it: the norm stands before lm_head.
    """

    aux_layers: tuple[int, ...] | None = None
    norm_output: NormOutput | None = None
    norm_before_residual: bool | None = None


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Which of the two layouts a config.json has. UserError when it is neither's EAGLE-3."""
    kind, architectures = config.get("speculators_model_type"), config.get("architectures") or []
    if kind == "eagle3":
        return "speculators"
    if kind is None and any(name in _ARCHITECTURES for name in architectures):
        return "plain"
    what = f"speculators_model_type is {kind!r}" if kind else f"architectures is {architectures!r}"
    raise UserError(
        f"config.json is not of an EAGLE-3 draft: {what}; expected speculators_model_type eagle3, or one of the "
        f"architectures {' and '.join(_ARCHITECTURES)}."
    )


def spec_from_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], hints: Hints) -> DraftSpec:
    """The draft that a config.json describes.

    Args:
      config: the parsed file.
      shapes: of the tensors beside it, by torch's names and orientation (`names.canonical`): they answer for
        draft_vocab_size and head_dim where the config does not.
      hints: answers that neither gives.

    Raises:
      UserError: naming the field, where it is missing, contradicts another, or is one that jeagle's draft has not.
    """
    layout = layout_of(config)
    _refuse_near_misses(config)
    decoder = config if layout == "plain" else _need(config, "transformer_layer_config")
    _refuse_foreign(config, decoder, ("llama",) if layout == "plain" else ("llama", "qwen3"))
    heads, width = _count(decoder, "num_attention_heads"), _count(decoder, "hidden_size")
    head_dim = decoder.get("head_dim") or _rows(shapes, "layers.0.self_attn.q_proj.weight") // heads
    norms = _plain_norms(config, hints) if layout == "plain" else _speculators_norms(config, hints)
    return DraftSpec(
        target_width=config.get("target_hidden_size") or width,
        width=width,
        target_vocab=_count(decoder, "vocab_size"),
        draft_vocab=config.get("draft_vocab_size") or _rows(shapes, "lm_head.weight"),
        aux_layers=_aux_layers(config, decoder, layout, hints.aux_layers),
        heads=heads,
        kv_heads=decoder.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_width=_count(decoder, "intermediate_size"),
        layers=_count(decoder, "num_hidden_layers"),
        norm_eps=float(_need(decoder, "rms_norm_eps")),
        rope=rope_of(decoder, head_dim),
        max_positions=_count(decoder, "max_position_embeddings"),
        **norms,
        qk_norm=decoder["model_type"] == "qwen3",
        attention_bias=bool(decoder.get("attention_bias")),
        sliding_window=_window(decoder),
        layer_types=(),
        end_token_ids=_ends(decoder.get("eos_token_id")),
    )


def _plain_norms(config: Mapping[str, Any], hints: Hints) -> dict[str, bool]:
    nested = config.get("eagle_config") or {}
    norms = {
        "norm_before_residual": bool(config.get("norm_before_residual", False)),
        "norm_before_fc": bool(nested.get("norm_before_fc", config.get("norm_before_fc", False))),
        "fc_norm": bool(config.get("fc_norm")),
    }
    if "norm_output" not in config:
        return norms
    means = "carry" if WRITTEN_BY in config else config.get(NORM_OUTPUT_MEANS, hints.norm_output)
    if means is None:
        raise UserError(
            f"config.json has norm_output {config['norm_output']}, which SGLang and vLLM read as the carried state's "
            "norm, and SpecForge as lm_head's: say which of the two meanings the draft was trained with."
        )
    return norms | {"carry_normed" if means == "carry" else "head_norm": bool(config["norm_output"])}


def _speculators_norms(config: Mapping[str, Any], hints: Hints) -> dict[str, bool]:
    written = config.get("norm_before_residual")
    before = hints.norm_before_residual if written is None else written
    if before is None:
        raise UserError(
            "config.json lacks norm_before_residual, which speculators then reads as false and vLLM as true: "
            "write into it what the draft was trained with."
        )
    norms = {flag: bool(config.get(flag, False)) for flag in _FLAGS} | {"norm_before_residual": bool(before)}
    return {"carry_normed": norms.pop("norm_output"), **norms}


def _aux_layers(
    config: Mapping[str, Any], decoder: Mapping[str, Any], layout: Layout, told: tuple[int, ...] | None
) -> tuple[int, ...]:
    """vLLM takes the top-level list as it is; SGLang takes the nested one plus one, as SpecForge means it."""
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS) if layout == "plain" else None
    found = {tuple(config[LAYER_IDS])} if config.get(LAYER_IDS) else set()
    found |= {tuple(i + 1 for i in nested)} if nested else set()
    if len(found) > 1 and told not in found:
        raise UserError(
            f"config.json names two sets of target layers: {LAYER_IDS} at its top is {config[LAYER_IDS]}, which vLLM "
            f"reads, and in eagle_config {nested}, to which SGLang adds one: say which layers it was trained on."
        )
    if not found and told is None:
        raise UserError(
            f"config.json has no {LAYER_IDS}, so an engine would guess the target's layers 2, n//2 and n-3: "
            "say which layers it was trained on."
        )
    aux_layers = told if told is not None and len(found) != 1 else next(iter(found))
    if told not in (None, aux_layers):
        raise UserError(f"config.json taps the target after layers {list(aux_layers)}, not {list(told or ())}.")
    if list(aux_layers) != sorted(set(aux_layers)):
        raise UserError(f"config.json taps the layers {list(aux_layers)}: engines collect them rising, and each once.")
    if decoder.get("num_aux_hidden_states") not in (None, len(aux_layers)):
        raise UserError(
            f"config.json has num_aux_hidden_states {decoder['num_aux_hidden_states']} for {len(aux_layers)} layers."
        )
    return aux_layers


def _window(decoder: Mapping[str, Any]) -> int:
    kinds, window = set(decoder.get("layer_types") or ()), decoder.get("sliding_window") or 0
    if not kinds:
        return window if decoder.get("use_sliding_window") else 0
    if kinds == {"full_attention"}:
        return 0
    if kinds == {"sliding_attention"} and window:
        return window
    raise UserError(
        f"config.json has layer_types {sorted(kinds)} and sliding_window {window or None}: jeagle's draft has one "
        "window for all of its layers, or none."
    )


def _refuse_foreign(config: Mapping[str, Any], decoder: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    kind = decoder.get("model_type")
    if kind not in kinds:
        raise UserError(
            f"config.json has model_type {kind!r} for the draft's layers; jeagle reads {' or '.join(kinds)}."
        )
    if decoder.get("hidden_act") not in (None, "silu"):
        raise UserError(f"config.json has hidden_act {decoder['hidden_act']!r}; jeagle's draft has silu.")
    if decoder.get("partial_rotary_factor") not in (None, 1):
        raise UserError("config.json has a partial_rotary_factor; jeagle's draft rotates whole heads.")
    for flag, holds in {
        "mlp_bias true": decoder.get("mlp_bias"),
        "bias true": decoder.get("bias"),
        "tie_word_embeddings true": config.get("tie_word_embeddings"),
        "use_aux_hidden_state false": (config.get("eagle_config") or {}).get("use_aux_hidden_state") is False,
    }.items():
        if holds:
            raise UserError(f"config.json has {flag}; jeagle's draft has no such thing.")


def _refuse_near_misses(config: Mapping[str, Any]) -> None:
    """A misspelt flag is kept by every loader, and does nothing."""
    for name in config:
        near = difflib.get_close_matches(name, _FLAGS, n=1, cutoff=0.85)
        if near and name not in _FLAGS:
            raise UserError(f"config.json has {name}, which nothing reads: did you mean {near[0]}?")


def _ends(ids: Any) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _need(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"config.json lacks {name}.")
    return config[name]


def _count(config: Mapping[str, Any], name: str) -> int:
    value = _need(config, name)
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"config.json has {name} {value!r}; it is a number above 0.")
    return value


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if not shapes.get(name):  # nor has a single number rows
        raise UserError(f"The checkpoint lacks {name}.")
    return shapes[name][0]
