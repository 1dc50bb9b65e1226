"""Reads a draft's config.json, in either layout, as a `DraftSpec`.

A field that two readers would understand differently is refused, and the message names it.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jeagle.errors import UserError
from jeagle.exchange.config_write import DECODER_SIZES, LAYER_IDS, NORM_SWITCHES, PLAIN_ARCHITECTURE, WRITTEN_BY
from jeagle.exchange.limits import Layout
from jeagle.interfaces import DraftSpec, LayerType, Rope

NORM_OUTPUT_MEANS = "norm_output_means"
"""A field that `config_file` adds to a plain config.json where the trainer that wrote it is known."""
_ARCHITECTURES = (PLAIN_ARCHITECTURE, "Eagle3LlamaForCausalLM")
_PLAIN_TYPES = ("llama", "phi3", "qwen2", "mistral")
"""Model types of plain drafts, whose architecture says what they are: a Llama's layers. SpecForge's files have the
target's type there, and neither it nor an engine reads it (SpecForge's modeling/auto.py, August 2026)."""


@dataclasses.dataclass(frozen=True)
class Hints:
    """Answers to the questions that a config.json leaves open. Where it answers one, the hint must agree with it.

    Attributes:
      aux_layers: layer boundaries, where there are no layer ids or two lists contradict each other.
      norm_output: what the field means in a plain config.json that jeagle did not write. "carry", as engines read it:
        the state that is handed to the next step is normed. "head", as SpecForge reads it: there is a norm before
        lm_head.
      norm_before_residual: where speculators' layout does not say it.
    """

    aux_layers: tuple[int, ...] | None = None
    norm_output: Literal["carry", "head"] | None = None
    norm_before_residual: bool | None = None


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Returns the layout of a config.json. Raises UserError where it does not describe an EAGLE-3 draft."""
    kind, architectures = config.get("speculators_model_type"), config.get("architectures") or []
    if kind == "eagle3":
        return "speculators"
    if kind is None and any(name in _ARCHITECTURES for name in architectures):
        return "plain"
    what = f"speculators_model_type is {kind!r}" if kind else f"architectures is {architectures!r}"
    raise UserError(
        f"config.json does not describe an EAGLE-3 draft: {what}; expected speculators_model_type eagle3, or one of "
        f"the architectures {' and '.join(_ARCHITECTURES)}."
    )


def spec_from_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], hints: Hints) -> DraftSpec:
    """Returns the draft that a config.json describes.

    Args:
      config: the parsed file, its field types checked.
      shapes: of the tensors in the same folder, by canonical torch name and in torch's orientation. They give
        draft_vocab_size and head_dim where the config does not.
      hints: answers to what neither of them gives.

    Raises:
      UserError: for a field that is missing, contradicts another one, or has a value that jeagle's draft does not
        support. The message names it.
    """
    layout = layout_of(config)
    decoder = dict(config if layout == "plain" else _required(config, "transformer_layer_config"))
    _check_supported(config, decoder, _PLAIN_TYPES if layout == "plain" else ("llama", "qwen3"))
    heads = _required(decoder, "num_attention_heads")
    decoder["num_key_value_heads"] = decoder.get("num_key_value_heads") or heads
    decoder["head_dim"] = decoder.get("head_dim") or _rows(shapes, "layers.0.self_attn.q_proj.weight") // heads
    sizes: dict[str, Any] = {name: _required(decoder, field) for field, name in DECODER_SIZES.items()}
    ends = decoder.get("eos_token_id")
    return DraftSpec(
        **sizes,
        target_width=config.get("target_hidden_size") or sizes["width"],
        draft_vocab=config.get("draft_vocab_size") or _rows(shapes, "lm_head.weight"),
        aux_layers=_aux_layers(config, decoder, hints.aux_layers),
        norm_eps=float(_required(decoder, "rms_norm_eps")),
        rope=_read_rope(decoder, sizes["head_dim"]),
        **_norms(config, layout, hints),
        qk_norm=decoder["model_type"] == "qwen3",
        attention_bias=bool(decoder.get("attention_bias")),
        **_attention(decoder, sizes["layers"]),
        end_token_ids=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
    )


def _norms(config: Mapping[str, Any], layout: Layout, hints: Hints) -> dict[str, Any]:
    norms = {name: bool(config.get(name)) for name in NORM_SWITCHES}
    if layout == "speculators":
        before_residual = config.get("norm_before_residual")
        before_residual = hints.norm_before_residual if before_residual is None else before_residual
        if before_residual is None:
            raise UserError(
                "config.json lacks norm_before_residual, which speculators then reads as false and vLLM as true: write "
                "the value that the draft was trained with into it."
            )
        return norms | {"norm_before_residual": before_residual, "carry_normed": bool(config.get("norm_output"))}
    norms["norm_before_fc"] = bool((config.get("eagle_config") or {}).get("norm_before_fc", norms["norm_before_fc"]))
    if "norm_output" not in config:
        return norms
    means = "carry" if WRITTEN_BY in config else config.get(NORM_OUTPUT_MEANS, hints.norm_output)
    if means is None:
        raise UserError(
            f"config.json has norm_output {config['norm_output']}, which SGLang and vLLM read as the norm of the "
            "carried state, and SpecForge as the norm before lm_head: give the meaning that the draft was trained with."
        )
    return norms | {"carry_normed" if means == "carry" else "head_norm": bool(config["norm_output"])}


def stored_aux_layers(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the layer ids at the top level of config.json, and those in eagle_config; () where there are none."""
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS) if layout_of(config) == "plain" else None
    return tuple(config.get(LAYER_IDS) or ()), tuple(nested or ())


def plus_one(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns aux layers from ids that count the layers from 0."""
    return tuple(i + 1 for i in ids)


def _aux_layers(config: Mapping[str, Any], decoder: Mapping[str, Any], hint: tuple[int, ...] | None) -> tuple[int, ...]:
    """vLLM uses the list at the top level as it is; SGLang adds one to the nested list, as SpecForge means it."""
    top, nested = stored_aux_layers(config)
    candidates = {ids for ids in (top, plus_one(nested)) if ids}
    if len(candidates) > 1 and hint not in candidates:
        raise UserError(
            f"config.json names two sets of target layers: {LAYER_IDS} is {list(top)} at its top level, which "
            f"vLLM reads, and {list(nested)} in eagle_config, to which SGLang adds one: give the aux layers that the "
            "draft was trained on."
        )
    if not candidates and hint is None:
        raise UserError(
            f"config.json has no {LAYER_IDS}, so that an engine would assume the target's layers 2, n//2 and n-3: give "
            "the aux layers that the draft was trained on."
        )
    aux_layers = hint if hint is not None and len(candidates) != 1 else next(iter(candidates))
    if hint not in (None, aux_layers):
        raise UserError(f"config.json has the aux layers {list(aux_layers)}, not {list(hint or ())}.")
    if list(aux_layers) != sorted(set(aux_layers)):
        raise UserError(
            f"config.json has the aux layers {list(aux_layers)}: engines collect them in rising order, each one once."
        )
    if decoder.get("num_aux_hidden_states") not in (None, len(aux_layers)):
        raise UserError(
            f"config.json has num_aux_hidden_states {decoder['num_aux_hidden_states']} for {len(aux_layers)} layers."
        )
    return aux_layers


def _attention(decoder: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Layers of one kind need no `layer_types` in a `DraftSpec`, whatever number of them config.json lists."""
    kinds, window = tuple(decoder.get("layer_types") or ()), decoder.get("sliding_window") or 0
    if not kinds:
        return {"sliding_window": window if decoder.get("use_sliding_window") else 0}
    if unknown := sorted(set(kinds) - set(get_args(LayerType))):
        raise UserError(
            f"config.json has {unknown[0]!r} in its layer_types; jeagle's draft supports "
            f"{' and '.join(get_args(LayerType))}."
        )
    if set(kinds) == {"full_attention"}:
        return {"sliding_window": 0}
    if not window:
        raise UserError("config.json has sliding_attention in its layer_types, but no sliding_window.")
    if set(kinds) == {"sliding_attention"}:
        return {"sliding_window": window}
    if len(kinds) != layers:
        raise UserError(f"config.json has {len(kinds)} layer_types for num_hidden_layers {layers}.")
    return {"sliding_window": window, "layer_types": kinds}


def _check_supported(config: Mapping[str, Any], decoder: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    switches = (*NORM_SWITCHES, "norm_output")  # every loader accepts a misspelt one, and ignores it
    for name in config:
        near = difflib.get_close_matches(name, switches, n=1, cutoff=0.85)
        if near and name not in switches:
            raise UserError(f"config.json has {name}, which nothing reads: did you mean {near[0]}?")
    if decoder.get("model_type") not in kinds:
        raise UserError(
            f"config.json has model_type {decoder.get('model_type')!r} for the draft's layers; jeagle reads "
            f"{' or '.join(kinds)}."
        )
    for section, field, supported in (
        (decoder, "hidden_act", "silu"),
        (decoder, "partial_rotary_factor", 1),
        (decoder, "mlp_bias", False),
        (decoder, "bias", False),
        (config, "tie_word_embeddings", False),
        (config.get("eagle_config") or {}, "use_aux_hidden_state", True),
    ):
        check_supported_value(field, section.get(field), (None, supported))


def check_supported_value(field: str, value: Any, supported: tuple[Any, ...]) -> None:
    """Raises UserError, naming the field, unless jeagle's draft supports its value; None stands for a missing one."""
    if value not in supported:
        choices = " or ".join(json.dumps(choice) for choice in supported if choice is not None)
        raise UserError(
            f"config.json has {field} {json.dumps(value)}, which jeagle's draft does not support"
            f"{f'; it supports {choices}' if choices else ''}."
        )


def _required(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"config.json lacks {name}.")
    return config[name]


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if not shapes.get(name):  # a tensor without axes has no rows either
        raise UserError(f"The checkpoint lacks {name}.")
    return shapes[name][0]


# The rotary embedding, in the fields of transformers 4 and of 5.

_LENGTH = "original_max_position_embeddings"
_SCALING_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _LENGTH),
    "yarn": ("factor", _LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "longrope": ("factor", "short_factor", "long_factor", _LENGTH),
}
"""The kinds of RoPE scaling, and the fields that the angles of each are computed from."""


def _read_rope(decoder: Mapping[str, Any], head_dim: int) -> Rope:
    """Returns the rotary embedding of a draft's layers; what the file does not say has transformers' default.

    transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling. Where both are present they must
    say the same. The lengths and the factor of a scaling that follow from other fields are added.
    """
    new, old = decoder.get("rope_parameters"), decoder.get("rope_scaling")
    from_old = _rope_from(old or {}, decoder.get("rope_theta"))
    rope = _rope_from(new, decoder.get("rope_theta")) if new else from_old
    if new and "rope_theta" in decoder and rope.theta != from_old.theta:
        raise UserError(f"config.json has two RoPE bases: rope_theta {from_old.theta}, rope_parameters {rope.theta}.")
    if new and old and rope.scaling != from_old.scaling:
        raise UserError("config.json has two RoPE scalings: rope_scaling and rope_parameters differ; remove one.")
    scaling = {name: value for name, value in rope.scaling if value is not None}
    kind, longest = str(scaling.get("rope_type", "default")), decoder["max_position_embeddings"]
    fields = _SCALING_FIELDS[kind]
    if _LENGTH in fields:
        original = longest if kind == "dynamic" else decoder.get(_LENGTH) or longest
        original = scaling.setdefault(_LENGTH, original)
        if kind in ("yarn", "longrope"):
            scaling.setdefault("factor", longest / original)
    if missing := [name for name in fields if name not in scaling]:
        raise UserError(
            f"config.json has the RoPE scaling {kind} without {missing[0]}, which its angles are computed from."
        )
    for name in {"short_factor", "long_factor"}.intersection(fields):
        if len(scaling[name]) != head_dim // 2:
            raise UserError(
                f"config.json has {name} {list(scaling[name])}; heads of {head_dim} dimensions need {head_dim // 2} "
                "numbers, one for each pair of dimensions."
            )
    for name in ("short_mscale", "long_mscale"):
        check_supported_value(name, scaling.get(name), (None,))
    return Rope(rope.theta, tuple(sorted(scaling.items())))


def _rope_from(parameters: Mapping[str, Any], theta: float | None) -> Rope:
    if nested := [name for name, value in parameters.items() if isinstance(value, Mapping)]:
        raise UserError(
            f"config.json has a RoPE for each kind of layer ({', '.join(nested)}); jeagle's draft has one: write the "
            "one of the draft's own layers into rope_parameters."
        )
    check_supported_value("partial_rotary_factor", parameters.get("partial_rotary_factor"), (None, 1))
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items() if k not in ("rope_theta", "type")}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    rest["rope_type"] = "longrope" if kind == "su" else kind  # su is its first name
    if rest["rope_type"] not in _SCALING_FIELDS:
        raise UserError(
            f"config.json has the RoPE scaling {kind!r}; jeagle's draft supports {', '.join(_SCALING_FIELDS)}."
        )
    if rest == {"rope_type": "default"}:
        rest = {}
    return Rope(float(parameters.get("rope_theta") or theta or Rope.theta), tuple(sorted(rest.items())))
