"""What families are described with: reading a config.json to the last switch, and naming weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.joints import Rope
from jeagle.layers import GATES
from jeagle.targets.spec import AttentionSpec, BlockSpec, DenseSpec, TargetSpec

# Keys of a config.json that change no number of a forward pass over text.
_INERT = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _sliding_window_pattern
    add_cross_attention architectures attention_dropout audio_config audio_token_id auto_map aux_loss_alpha
    bad_words_ids begin_suppress_tokens boa_token_id boi_token_id boi_token_index bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eoa_token_id
    eoa_token_index eoi_token_id eoi_token_index eos_token_id ep_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id head_dim_key
    id2label image_token_id image_token_index initial_context_length initializer_range is_decoder
    is_encoder_decoder label2id language_model_only length_penalty max_position_embeddings max_window_layers
    min_length mm_tokens_per_image model_type mtp_loss_scaling mtp_num_hidden_layers
    mtp_use_dedicated_embeddings multimodal_projector_bias no_repeat_ngram_size no_rope_layer_interval
    num_beam_groups num_beams num_nextn_predict_layers num_return_sequences output_attentions output_dropout
    output_hidden_states output_router_logits output_scores pad_token_id partial_rotary_factor prefix
    pretraining_tp problem_type projector_hidden_act pruned_heads quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate rope_local_base_freq rope_scaling
    rope_theta router_aux_loss_coef router_jitter_noise sep_token_id seq_aux sliding_window_pattern
    spatial_merge_size suppress_tokens task_specific_params temperature tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version type_vocab_size typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_mambapy video_token_id vision_config
    vision_end_token_id vision_feature_layer vision_start_token_id
"""
INERT = frozenset(_INERT.split())


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


class Switches:
    """A config.json with the defaults of its model type, and a record of what has been read of it."""

    def __init__(self, architecture: str, values: dict[str, Any]):
        self.architecture, self._values = architecture, values
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if self._values.get(name) is None:
            raise UserError(f"The target's config.json lacks {name}, which {self.architecture} needs.")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """A switch's value; `default` where it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def only(self, **honoured: Iterable[Any]) -> None:
        """UserError unless each switch has one of the values given (or is absent)."""
        for name, values in honoured.items():
            value = self.get(name)
            if value is not None and value not in values:
                raise UserError(
                    f"The target's config.json has {name} = {value!r}, which changes its numbers and is not supported "
                    f"for {self.architecture} (supported: {', '.join(map(repr, values))})."
                )

    def finish(self) -> None:
        """UserError if a switch that could change numbers has not been read."""
        for name in sorted(set(self._values) - self._read - INERT):
            value = self._values[name]
            if value is not None and value is not False and value not in ({}, []):
                raise UserError(
                    f"The target's config.json has {name} = {value!r}, which jeagle does not know for "
                    f"{self.architecture}: it may change the model's numbers, so it is refused."
                )


def rope_of(switches: Switches, kind: str | None = None) -> Rope:
    """RoPE from `rope_parameters`, which may differ by kind of layer."""
    found = dict(switches["rope_parameters"])
    if kind is not None and isinstance(found.get(kind), dict):
        found = dict(found[kind])
    theta = float(found.pop("rope_theta", 10000.0))
    scaling = {k: _frozen(v) for k, v in found.items() if v is not None and k not in _NOT_SCALING}
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


# Of multimodal positions, which are one and the same over text; of other mechanisms; and duplicates of other keys.
_NOT_SCALING = {"type", "mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings"}


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
    if all(block == blocks[0] for block in blocks):
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


def layer_types(switches: Switches, otherwise: Callable[[int], str] = lambda i: "full_attention") -> list[str]:
    """Kinds of the layers, by the config's own list or else by a rule."""
    listed = switches.get("layer_types")
    return list(listed) if listed else [otherwise(i) for i in range(switches["num_hidden_layers"])]


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
        names[f"blocks.mixture.experts.{ours}"] = (alone, together)
    return names


def half_of_experts(second: bool) -> Callable[[BlockSpec], np.ndarray]:
    def rows(block: BlockSpec) -> np.ndarray:
        assert block.experts is not None
        width = block.experts.width
        return np.arange(width) + (width if second else 0)

    return rows


LLAMA: Names = merged(stem_names(), pre_norm_names(), attention_names(), mlp_names())
