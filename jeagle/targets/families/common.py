"""Tools that describe target families: reading every key of a config.json, and naming weights."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.interfaces import Rope
from jeagle.layers import GATES
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DenseSpec, TargetSpec

# Keys of a config.json that do not change the numbers of a forward pass over text.
_INERT = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _name_or_path _sliding_window_pattern add_cross_attention architectures
    attn_implementation audio_config audio_token_id auto_map aux_loss_alpha
    bad_words_ids begin_suppress_tokens boa_token_id boi_token_id boi_token_index bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eoa_token_id
    eoa_token_index eoi_token_id eoi_token_index eos_token_id ep_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing head_dim_key id2label image_token_id image_token_index initial_context_length
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id language_model_only length_penalty
    loss_type max_length max_new_tokens max_position_embeddings max_sequence_length max_window_layers min_length
    min_p mm_tokens_per_image model_max_length model_type mtp_loss_scaling mtp_num_hidden_layers
    mtp_use_dedicated_embeddings multimodal_projector_bias no_repeat_ngram_size no_rope_layer_interval
    num_beam_groups num_beams num_nextn_predict_layers num_return_sequences output_attentions output_dropout
    output_hidden_states output_router_logits output_scores pad_token_id partial_rotary_factor prefix
    pretraining_tp problem_type projector_hidden_act pruned_heads quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate rope_local_base_freq rope_scaling
    rope_theta router_aux_loss_coef router_jitter_noise sep_token_id seq_aux sliding_window_pattern
    spatial_merge_size suppress_tokens task_specific_params temperature tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    type_vocab_size typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_mambapy video_token_id
    vision_config vision_end_token_id vision_feature_layer vision_start_token_id
"""
INERT = frozenset(_INERT.split())


class Switches:
    """A config.json, completed with the defaults of its model type.

    It records which keys are read: a key that nobody reads is refused, since it may change the model's numbers.
    """

    def __init__(self, architecture: str, values: dict[str, Any]):
        self.architecture, self._values = architecture, values
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """Returns the value of a key. Raises UserError if the key is absent or null."""
        if self._values.get(name) is None:
            raise UserError(f"The target's config.json lacks {name}, which {self.architecture} needs.")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a key; `default` if the key is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def only(self, **supported: Iterable[Any]) -> None:
        """Raises UserError unless each key has one of its supported values, or is absent."""
        for name, values in supported.items():
            value = self.get(name)
            if value is not None and value not in values:
                raise UserError(
                    f"The target's config.json has {name} = {value!r}, which changes its numbers and is not supported "
                    f"for {self.architecture} (supported: {', '.join(map(repr, values))})."
                )

    def read_list_of_layers(self, layers: int) -> None:
        """Checks `layer_types` of a family whose layers are all of one kind."""
        if "layer_types" not in self._read:
            self.only(layer_types=([kind] * layers for kind in ("full_attention", "sliding_attention")))

    def finish(self) -> None:
        """Raises UserError if a key that may change numbers has not been read."""
        for name in sorted(set(self._values) - self._read - INERT):
            value = self._values[name]
            if "dropout" not in name and value is not None and value is not False and value not in ({}, []):
                raise UserError(
                    f"The target's config.json has {name} = {value!r}, which jeagle does not know for "
                    f"{self.architecture}: it may change the model's numbers, so it is refused."
                )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a parameter is stored in a checkpoint.

    Attributes:
      name: Hugging Face's name of the tensor, with {i} for the layer and {e} for the expert. With {e}, the parameter is
        the stack of all experts.
      rows: a layer's specification -> which of the tensor's outputs belong to this parameter, as indices along its
        first axis (its last one if not transposed); None = all.
      transposed: the tensor's matrices are [out, in], and the parameter's are [in, out].
      plus: a number that is added, for norms that are stored as their difference from 1.
      squeeze: the tensor has additional axes of length 1 (as a convolution's), which are dropped.
    """

    name: str
    rows: Callable[[BlockSpec], np.ndarray] | None = None
    transposed: bool = True
    plus: float = 0.0
    squeeze: bool = False

    @property
    def by_expert(self) -> bool:
        """Whether each expert is a tensor of its own."""
        return "{e}" in self.name

    def row_axis(self, rank: int) -> int:
        """The axis of the tensor, which has so many, that `rows` counts along."""
        return rank - 2 if self.transposed and rank > 1 else rank - 1


Names = dict[str, Piece | tuple[Piece, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """Description of a family.

    Attributes:
      read: config.json -> TargetSpec; it raises UserError for a key that it does not support.
      names: parameter of `Decoder`, without layer numbers -> where it is stored; of several pieces, the first one that
        exists counts.
      model_type: Hugging Face's model type, whose defaults complete a config.json; "" = no defaults.
    """

    read: Callable[[Switches], TargetSpec]
    names: Names
    model_type: str = ""


def rope_from_switches(switches: Switches, kind: str | None = None) -> Rope:
    """Reads `rope_parameters`, which may differ by kind of layer."""
    parameters = dict(switches["rope_parameters"])
    if kind is not None and isinstance(parameters.get(kind), dict):
        parameters = dict(parameters[kind])
    theta = float(parameters.pop("rope_theta", None) or 10000.0)
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()}
    scaling = {k: v for k, v in hashable.items() if v is not None and k not in _NOT_SCALING}
    if unknown := sorted(set(scaling) - _SCALING):
        raise UserError(
            f"The target's config.json has {unknown[0]} = {scaling[unknown[0]]!r} in its rope_scaling, which jeagle "
            f"does not know for {switches.architecture}: it may change the model's numbers, so it is refused."
        )
    plain = scaling.get("rope_type", "default") == "default"
    if plain and (others := sorted(set(scaling) - {"rope_type", "partial_rotary_factor"})):
        raise UserError(
            f"The target's config.json has {others[0]} = {scaling[others[0]]!r} in its rope_scaling, which names no "
            "rope_type that reads it, so that it would count for nothing: copy the model's own file there."
        )
    scaling["rope_type"] = "longrope" if scaling.get("rope_type") == "su" else scaling.get("rope_type", "default")
    if missing := [name for name in _NEEDED.get(str(scaling["rope_type"]), ()) if name not in scaling]:
        raise UserError(
            f"The target's config.json has the RoPE scaling {scaling['rope_type']} without {missing[0]}, which its "
            "angles are computed from: copy the model's own file there."
        )
    longest = switches.get("max_position_embeddings", 2048)
    if scaling["rope_type"] in ("llama3", "dynamic", "yarn", "longrope"):
        scaling.setdefault(
            "original_max_position_embeddings", switches.get("original_max_position_embeddings", longest)
        )
    if scaling["rope_type"] == "dynamic":
        scaling["original_max_position_embeddings"] = longest  # whatever config.json says
    if scaling["rope_type"] in ("yarn", "longrope"):
        scaling.setdefault("factor", longest / scaling["original_max_position_embeddings"])
    if scaling.get("partial_rotary_factor") == 1.0:
        del scaling["partial_rotary_factor"]
    return Rope(theta) if scaling == {"rope_type": "default"} else Rope(theta, tuple(sorted(scaling.items())))


# Keys of multimodal positions, which are equal over text; of other mechanisms; of the training; and duplicates.
_NOT_SCALING = {"type", "mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings"}
_NOT_SCALING |= {"finetuned"}
# Keys without which the angles of a kind of scaling are not known.
_NEEDED = {"linear": ("factor",), "dynamic": ("factor",), "longrope": ("short_factor", "long_factor")}
_NEEDED |= {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
# Keys that layers.rope reads.
_SCALING = {"rope_type", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor"}
_SCALING |= {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_SCALING |= {"attn_factor", "long_factor", "short_factor"}


def head_dim(switches: Switches) -> int:
    """The width of a head; by default the model's width divided by its heads."""
    return switches.get("head_dim") or switches["hidden_size"] // switches["num_attention_heads"]


def attention_spec(switches: Switches, **over: Any) -> AttentionSpec:
    """Grouped-query attention of a config.json; `over` has the family's own fields."""
    return AttentionSpec(**(_heads(switches, over) | over))


def _heads(switches: Switches, over: dict[str, Any]) -> dict[str, Any]:
    """The fields that `AttentionSpec` and `TargetSpec` share; the rotary embedding is not read where it is given."""
    heads = switches["num_attention_heads"]
    kv_heads = switches.get("num_key_value_heads", heads)
    rope = {} if "rope" in over else {"rope": rope_from_switches(switches)}
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim(switches)} | rope


def attention_biases(switches: Switches) -> dict[str, bool]:
    """Fields of AttentionSpec for families in which `attention_bias` concerns all projections."""
    bias = bool(switches.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias}


def sliding_windows(switches: Switches, **rule: Any) -> list[int]:
    """The sliding window of each layer, 0 = none; `rule` as for `layer_types`."""
    window = switches.get("sliding_window", 0)
    return [window if kind == "sliding_attention" else 0 for kind in layer_types(switches, **rule)]


def target_spec(switches: Switches, blocks: Iterable[BlockSpec], **over: Any) -> TargetSpec:
    """The TargetSpec of these layers; `over` has the family's own fields. Checks that every key was read."""
    blocks = tuple(blocks)
    if len(blocks) != switches["num_hidden_layers"]:
        raise UserError(
            f"The target's config.json describes {len(blocks)} layers in its lists and num_hidden_layers = "
            f"{switches['num_hidden_layers']}: they must agree."
        )
    switches.read_list_of_layers(len(blocks))
    ends = switches.get("eos_token_id", ())
    fields: dict[str, Any] = {
        "architecture": switches.architecture,
        "width": switches["hidden_size"],
        "vocab": switches["vocab_size"],
        "blocks": blocks,
        "norm_eps": switches.get("rms_norm_eps", 1e-6),
        "tied": bool(switches.get("tie_word_embeddings", False)),
        "mlp_width": switches.get("intermediate_size") or switches.get("moe_intermediate_size"),
        "max_positions": switches.get("max_position_embeddings", 2048),
        "end_token_ids": tuple(ends) if isinstance(ends, list | tuple) else (ends,),
    }
    spec = TargetSpec(**(_heads(switches, over) | fields | over))
    switches.finish()
    return spec


def dense_spec(switches: Switches, **over: Any) -> DenseSpec:
    """The gated MLP of a config.json; `over` has the family's own fields. UserError for an unknown activation."""
    plain = switches.get("hidden_act", "silu")
    activation = switches.get("hidden_activation") or plain
    if activation not in GATES:
        raise UserError(f"The target's activation {activation!r} is not supported; supported are: {', '.join(GATES)}.")
    return DenseSpec(**({"width": switches["intermediate_size"], "activation": activation} | over))


def layer_types(
    switches: Switches,
    otherwise: Callable[[int], str] = lambda i: "full_attention",
    *,
    beside_full: str = "sliding_attention",
) -> list[str]:
    """The kinds of the layers, by config.json's list or, if there is none, by a rule.

    Args:
      otherwise: the rule: number of a layer -> its kind.
      beside_full: the only kind besides "full_attention" that the family supports.

    Raises:
      UserError: for any other kind.
    """
    listed = switches.get("layer_types")
    kinds = list(listed) if listed else [otherwise(i) for i in range(switches["num_hidden_layers"])]
    if unknown := sorted(set(kinds) - {"full_attention", beside_full}):
        raise UserError(
            f"The target's config.json has {unknown[0]!r} in its layer_types, which is not supported for "
            f"{switches.architecture} (supported: 'full_attention', {beside_full!r})."
        )
    return kinds


LAYER = "model.layers.{i}."


def linear(ours: str, theirs: str, **how: Any) -> Names:
    """Where a kernel and its bias are stored; `how` has fields of `Piece`."""
    bias = {k: v for k, v in how.items() if k == "rows"}
    return {
        f"blocks.{ours}.kernel": Piece(f"{LAYER}{theirs}.weight", **how),
        f"blocks.{ours}.bias": Piece(f"{LAYER}{theirs}.bias", **bias),
    }


def norm(ours: str, theirs: str, plus: float = 0.0) -> Names:
    """Where a norm's weights are stored."""
    return {f"blocks.{ours}": Piece(f"{LAYER}{theirs}.weight", plus=plus)}


def merged(*parts: Mapping[str, Piece | tuple[Piece, ...]]) -> Names:
    """The names of all parts; later ones replace earlier ones."""
    return {key: piece for part in parts for key, piece in part.items()}


def mlp_names(ours: str = "mlp", theirs: str = "mlp") -> Names:
    """Where a gated MLP is stored."""
    return merged(*(linear(f"{ours}.{p}", f"{theirs}.{p}") for p in ("gate_proj", "up_proj", "down_proj")))


def attention_names(plus: float = 0.0) -> Names:
    """Where grouped-query attention is stored; `plus` is added to the norms of queries and keys."""
    projections = merged(*(linear(f"mixer.{p}", f"self_attn.{p}") for p in ("q_proj", "k_proj", "v_proj", "o_proj")))
    return projections | merged(*(norm(f"mixer.{p}", f"self_attn.{p}", plus) for p in ("q_norm", "k_norm")))


def stem_names(plus: float = 0.0) -> Names:
    """Where embedding, final norm and lm_head are stored."""
    return {
        "embed_tokens": Piece("model.embed_tokens.weight", transposed=False),
        "norm": Piece("model.norm.weight", plus=plus),
        "lm_head": Piece("lm_head.weight", transposed=False),
    }


def pre_norm_names(plus: float = 0.0) -> Names:
    """Where the norms before mixer and MLP are stored."""
    return norm("before_mixer", "input_layernorm", plus) | norm("before_mlp", "post_attention_layernorm", plus)


def expert_names(
    theirs: str = "mlp.experts", parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[Piece, Piece]]:
    """Where experts are stored: each in tensors of its own, or all of them in tensors [E, 2F, H] and [E, H, F]."""
    gate_up, down = f"{LAYER}{theirs}.gate_up_proj", f"{LAYER}{theirs}.down_proj"
    together = (*(Piece(gate_up, fused_rows(part, lambda b: [b.experts.width] * 2)) for part in range(2)), Piece(down))
    return {
        f"blocks.moe.experts.{ours}": (Piece(f"{LAYER}{theirs}.{{e}}.{part}.weight"), piece)
        for ours, part, piece in zip(("gate_proj", "up_proj", "down_proj"), parts, together, strict=True)
    }


def fused_rows(
    part: int, sizes: Callable[[Any], Sequence[int]], groups: Callable[[Any], int] = lambda block: 1
) -> Callable[[BlockSpec], np.ndarray]:
    """`Piece.rows` of one of several parameters in a fused tensor.

    Args:
      part: which of the parameters.
      sizes: a layer's specification -> the number of rows of each parameter in a group.
      groups: a layer's specification -> the number of groups, such as heads, each with rows of every parameter.
    """

    def rows(block: BlockSpec) -> np.ndarray:
        widths = sizes(block)
        start = sum(widths[:part])
        by_group = np.arange(groups(block) * sum(widths)).reshape(groups(block), -1)
        return by_group[:, start : start + widths[part]].reshape(-1)

    return rows


def fused_linears(
    theirs: str, ours: Sequence[str], sizes: Callable[[Any], Sequence[int]], groups: Callable[[Any], int] = lambda b: 1
) -> Names:
    """Where kernels and biases are stored that share one tensor; `sizes` and `groups` as for `fused_rows`."""
    return merged(*(linear(own, theirs, rows=fused_rows(part, sizes, groups)) for part, own in enumerate(ours)))


LLAMA: Names = merged(stem_names(), pre_norm_names(), attention_names(), mlp_names())
