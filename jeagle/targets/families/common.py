"""What families are described with: reading a config.json to the last switch, and naming weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.interfaces import Rope
from jeagle.layers import GATES
from jeagle.targets.families.switches import Switches
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DenseSpec, TargetSpec


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a parameter lies in a checkpoint.

    Attributes:
      name: Hugging Face's, {i} the layer and {e} the expert (then the experts are stacked).
      rows: which of the tensor's outputs are this parameter's, given the layer: indices along its first axis (or, not
        transposed, its last); None = all.
      transposed: matrices lie [out, in] there and [in, out] here.
      plus: what is added to the numbers (norms stored as their distance from 1).
      squeeze: the tensor has axes of length one more (a convolution's), which are dropped.
    """

    name: str
    rows: Callable[[BlockSpec], np.ndarray] | None = None
    transposed: bool = True
    plus: float = 0.0
    squeeze: bool = False


Names = dict[str, Piece | tuple[Piece, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A literal description of a family.

    Attributes:
      read: a config.json's switches -> TargetSpec; refuses what it does not honour, by name.
      names: parameter of `Decoder`, layer numbers left out -> where it lies; of several pieces the first one there is.
      model_type: Hugging Face's, by which transformers knows the defaults of a config.json; "" if it knows none.
    """

    read: Callable[[Switches], TargetSpec]
    names: Names
    model_type: str = ""


def rope_of(switches: Switches, kind: str | None = None) -> Rope:
    """RoPE from `rope_parameters`, which may differ by kind of layer."""
    found = dict(switches["rope_parameters"])
    if kind is not None and isinstance(found.get(kind), dict):
        found = dict(found[kind])
    theta = float(found.pop("rope_theta", 10000.0))
    scaling = {k: _frozen(v) for k, v in found.items() if v is not None and k not in _NOT_SCALING}
    if unknown := sorted(set(scaling) - _SCALING):
        raise UserError(
            f"The target's config.json has {unknown[0]} = {scaling[unknown[0]]!r} in its rope_scaling, which jeagle "
            f"does not know for {switches.architecture}: it may change the model's numbers, so it is refused."
        )
    scaling["rope_type"] = "longrope" if scaling.get("rope_type") == "su" else scaling.get("rope_type", "default")
    longest = switches.get("max_position_embeddings", 2048)
    if scaling["rope_type"] in ("llama3", "dynamic", "yarn", "longrope"):
        scaling.setdefault(
            "original_max_position_embeddings", switches.get("original_max_position_embeddings", longest)
        )
    if scaling["rope_type"] == "dynamic":
        scaling["original_max_position_embeddings"] = longest  # what the formula divides by, whatever else is given
    if scaling["rope_type"] in ("yarn", "longrope"):
        scaling.setdefault("factor", longest / scaling["original_max_position_embeddings"])
    if scaling.get("partial_rotary_factor") == 1.0:
        del scaling["partial_rotary_factor"]
    return Rope(theta) if scaling == {"rope_type": "default"} else Rope(theta, tuple(sorted(scaling.items())))


# Of multimodal positions, which are one and the same over text; of other mechanisms; of how a model was trained; and
# duplicates of other keys.
_NOT_SCALING = {"type", "mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings"}
_NOT_SCALING |= {"finetuned"}
# What layers.rope reads.
_SCALING = {"rope_type", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor"}
_SCALING |= {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_SCALING |= {"attn_factor", "long_factor", "short_factor"}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def head_dim(switches: Switches) -> int:
    return switches.get("head_dim") or switches["hidden_size"] // switches["num_attention_heads"]


def attention(switches: Switches, **over: Any) -> AttentionSpec:
    """Plain grouped-query attention of a config.json, with the family's own switches in `over`."""
    heads = switches["num_attention_heads"]
    fields: dict[str, Any] = {
        "heads": heads,
        "kv_heads": switches.get("num_key_value_heads", heads),
        "head_dim": head_dim(switches),
    }
    if "rope" not in over:
        fields["rope"] = rope_of(switches)
    return AttentionSpec(**(fields | over))


def target(switches: Switches, blocks: Iterable[BlockSpec], **over: Any) -> TargetSpec:
    """The TargetSpec of these layers, with what every family has in common; checks that every switch was read."""
    heads, blocks = switches["num_attention_heads"], tuple(blocks)
    if len(blocks) != switches["num_hidden_layers"]:
        raise UserError(
            f"The target's config.json describes {len(blocks)} layers in its lists and num_hidden_layers = "
            f"{switches['num_hidden_layers']}: they must agree."
        )
    if not switches.was_read("layer_types"):
        switches.only(layer_types=([kind] * len(blocks) for kind in ("full_attention", "sliding_attention")))
    ends = switches.get("eos_token_id", ())
    fields: dict[str, Any] = {
        "architecture": switches.architecture,
        "width": switches["hidden_size"],
        "vocab": switches["vocab_size"],
        "blocks": blocks,
        "norm_eps": switches.get("rms_norm_eps", 1e-6),
        "tied": bool(switches.get("tie_word_embeddings", False)),
        "heads": heads,
        "kv_heads": switches.get("num_key_value_heads", heads),
        "head_dim": head_dim(switches),
        "mlp_width": switches.get("intermediate_size") or switches.get("moe_intermediate_size"),
        "max_positions": switches.get("max_position_embeddings", 2048),
        "end_token_ids": tuple(ends) if isinstance(ends, list | tuple) else (ends,),
    }
    if "rope" not in over:
        fields["rope"] = rope_of(switches)
    spec = TargetSpec(**(fields | over))
    switches.finish()
    return spec


def dense(switches: Switches, **over: Any) -> DenseSpec:
    plain, special = switches.get("hidden_act", "silu"), switches.get("hidden_activation")
    activation = special or plain
    if activation not in GATES:
        raise UserError(f"The target's activation {activation!r} is not supported; these are: {', '.join(GATES)}.")
    return DenseSpec(**({"width": switches["intermediate_size"], "activation": activation} | over))


def layer_types(
    switches: Switches,
    otherwise: Callable[[int], str] = lambda i: "full_attention",
    *,
    beside_full: str = "sliding_attention",
) -> list[str]:
    """Kinds of the layers, by the config's own list or else by a rule. UserError for a kind that is not honoured."""
    listed = switches.get("layer_types")
    kinds = list(listed) if listed else [otherwise(i) for i in range(switches["num_hidden_layers"])]
    if unknown := sorted(set(kinds) - {"full_attention", beside_full}):
        raise UserError(
            f"The target's config.json has {unknown[0]!r} in its layer_types, which is not supported for "
            f"{switches.architecture} (supported: 'full_attention', {beside_full!r})."
        )
    return kinds


# Names: Llama's, from which the others differ.

_LAYER = "model.layers.{i}."


def linear(ours: str, theirs: str, **how: Any) -> Names:
    """A kernel and its bias."""
    bias = {k: v for k, v in how.items() if k == "rows"}
    return {
        f"blocks.{ours}.kernel": Piece(f"{_LAYER}{theirs}.weight", **how),
        f"blocks.{ours}.bias": Piece(f"{_LAYER}{theirs}.bias", **bias),
    }


def norm(ours: str, theirs: str, plus: float = 0.0) -> Names:
    return {f"blocks.{ours}": Piece(f"{_LAYER}{theirs}.weight", plus=plus)}


def merged(*parts: Names) -> Names:
    return {key: piece for part in parts for key, piece in part.items()}


def mlp_names(ours: str = "mlp", theirs: str = "mlp") -> Names:
    return merged(*(linear(f"{ours}.{p}", f"{theirs}.{p}") for p in ("gate_proj", "up_proj", "down_proj")))


def attention_names() -> Names:
    projections = merged(*(linear(f"mixer.{p}", f"self_attn.{p}") for p in ("q_proj", "k_proj", "v_proj", "o_proj")))
    return projections | norm("mixer.q_norm", "self_attn.q_norm") | norm("mixer.k_norm", "self_attn.k_norm")


def stem_names(plus: float = 0.0) -> Names:
    return {
        "embed_tokens": Piece("model.embed_tokens.weight", transposed=False),
        "norm": Piece("model.norm.weight", plus=plus),
        "lm_head": Piece("lm_head.weight", transposed=False),
    }


def pre_norm_names(plus: float = 0.0) -> Names:
    return norm("before_mixer", "input_layernorm", plus) | norm("before_mlp", "post_attention_layernorm", plus)


def expert_names(
    theirs: str = "mlp.experts", parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Names:
    """Experts one by one, as most checkpoints have them, or gate and up of all of them in one tensor [E, 2F, H]."""
    names: Names = {}
    for ours, part in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
        alone = Piece(f"{_LAYER}{theirs}.{{e}}.{part}.weight")
        if ours == "down_proj":
            together = Piece(f"{_LAYER}{theirs}.down_proj")
        else:
            together = Piece(f"{_LAYER}{theirs}.gate_up_proj", rows=half_of_experts(ours == "up_proj"))
        names[f"blocks.moe.experts.{ours}"] = (alone, together)
    return names


def half_of_experts(second: bool) -> Callable[[BlockSpec], np.ndarray]:
    def rows(block: BlockSpec) -> np.ndarray:
        assert block.experts is not None
        width = block.experts.width
        return np.arange(width) + (width if second else 0)

    return rows


LLAMA: Names = merged(stem_names(), pre_norm_names(), attention_names(), mlp_names())
