"""Specification of a target, whatever its family: everything that `Decoder` needs, and nothing about files."""

import dataclasses
import itertools
from typing import Literal

from jeagle.errors import UserError
from jeagle.interfaces import PLAIN_LOGITS, LogitShape, Rope


@dataclasses.dataclass(frozen=True)
class AttentionTemperature:
    """Queries are multiplied by 1 + beta * log(1 + floor((position + start) / span)).

    Source: Llama 4 (start 1) and Ministral 3 (start 0), after Scalable-Softmax (arXiv 2501.19399).
    """

    beta: float
    span: float
    start: int = 0


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention of one layer.

    Attributes:
      heads, kv_heads, head_dim: Q, G, C.
      rope: None for a layer without rotary embedding.
      interleaved: rotated pairs are neighbours (0, 1), (2, 3), ... instead of the two halves of a head.
      window: number of positions that a query attends to, its own included; 0 = all before it.
      chunk: a query attends only to keys of its own chunk of this many positions; 0 = no chunks.
      scale: factor of the scores; 0 = 1 / sqrt(C).
      soft_cap: scores become cap * tanh(scores / cap); 0 = no cap.
      qkv_bias, out_bias: whether the projections of queries, keys and values, or of the output, have biases.
      qk_norm: RMSNorm of queries and keys: "head" over each head; "all_heads" over all heads together; "rotated" over
        each head after the rotation, without weights; "" = none.
      value_norm: RMSNorm without weights over each value head.
      values_are_keys: values are the keys before norm and rotation (one projection for both).
      sinks: each head has a learnt score that takes part in the softmax and has no value.
      gated: the output is multiplied by the sigmoid of a projection of the layer's input.
      temperature: growth of the queries with their position; None = none.
      share_kv_as: a name under which later layers can read this layer's keys and values; "" = none (Gemma).
      read_kv_from: the name of the keys and values that this layer reads, having none of its own; "" = its own.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    interleaved: bool = False
    window: int = 0
    chunk: int = 0
    scale: float = 0.0
    soft_cap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["", "head", "all_heads", "rotated"] = ""
    value_norm: bool = False
    values_are_keys: bool = False
    sinks: bool = False
    gated: bool = False
    temperature: AttentionTemperature | None = None
    share_kv_as: str = ""
    read_kv_from: str = ""


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention: keys and values are made from one narrow latent, which alone is cached.

    Attributes:
      q_rank: width of the queries' latent; 0 = queries are projected directly.
      kv_rank: width of the keys' and values' latent.
      nope_dim, rope_dim: widths of the parts of a key without and with rotation; all heads share the rotated part.
      value_dim: width of a value head.
      interleaved: as in `AttentionSpec`.
      bias: whether the first projections of queries, keys and values, and that of the output, have biases.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    interleaved: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """Gated delta rule: each value head has a state [key_dim, value_dim] instead of cached keys and values.

    Attributes:
      key_heads, value_heads, key_dim, value_dim: numbers and widths of heads.
      kernel: length of the convolution before the rule, in tokens.

    Source: Gated Delta Networks (arXiv 2412.06464), as in Qwen3-Next.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """A gated MLP of inner width `width`: down(activation(gate(x)) * up(x))."""

    width: int
    activation: str = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """How the experts of a token and their weights are chosen.

    Attributes:
      scores: "softmax" over all experts, "sigmoid" of each, or "chosen" for a softmax over the chosen ones alone.
      renormalised: the weights of the chosen experts are divided by their sum.
      scale: factor of the weights, applied last.
      groups, chosen_groups: experts are chosen only from the best `chosen_groups` of `groups`; 0 = no groups.
      group_score: score of a group, of its best expert ("max") or the sum of its best two ("top2").
      bias: the router's projection has a bias.
      correction: the router has a bias for choosing experts that does not enter their weights.
      weighs_input: the weights multiply the experts' inputs instead of their outputs (Llama 4).
      normed: the router reads its own RMSNorm of the residual stream, and each expert has a scale (Gemma 4).
    """

    scores: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    renormalised: bool = False
    scale: float = 1.0
    groups: int = 0
    chosen_groups: int = 0
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False
    correction: bool = False
    weighs_input: bool = False
    normed: bool = False


@dataclasses.dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of `count` gated MLPs of inner width `width`, `chosen` of them for each token.

    Attributes:
      bias: the experts' projections have biases.
      shared_width: inner width of an MLP that every token goes through as well; 0 = none.
      shared_gate: the output of that MLP is multiplied by the sigmoid of a projection to one number.
      clamp: alpha and limit of the activation "clamped_swiglu".
    """

    count: int
    chosen: int
    width: int
    router: RouterSpec
    activation: str = "silu"
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    clamp: tuple[float, float] = (1.702, 7.0)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One layer: a mixer over time, then an MLP, experts, or both side by side (Gemma 4).

    Attributes:
      norms: places of the norms: "pre" before mixer and MLP; "post" after them, before the residual is added; "both".
      residual: factor of the outputs of mixer and MLP before they are added to the residual stream.
      per_layer_width: P, the width of Gemma 4's per-layer inputs; 0 = none.
      scaled: the layer's output is multiplied by a stored number (Gemma 4).
    """

    mixer: AttentionSpec | LatentSpec | DeltaSpec
    mlp: DenseSpec | None = None
    experts: ExpertsSpec | None = None
    norms: Literal["pre", "post", "both"] = "pre"
    residual: float = 1.0
    per_layer_width: int = 0
    scaled: bool = False


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """Specification of a target.

    Attributes:
      architecture: the name in Hugging Face's config.json.
      width: H. vocab: V. norm_eps: epsilon of every RMSNorm.
      blocks: the layers, one by one.
      tied: whether lm_head is the embedding.
      heads, kv_heads, head_dim, mlp_width, rope: of the plain Llama layer that a draft of this target has.
      embed_scale: factor of embedding rows, which is rounded to the weights' type as the families do.
      logits: scale and soft cap of the logits.
      per_layer_vocab: number of rows of Gemma 4's per-layer embedding; 0 = none.
      max_positions: longest sequence that the target was made for, in tokens.
      end_token_ids: ids that end an answer, by the model's own configuration.
    """

    architecture: str
    width: int
    vocab: int
    blocks: tuple[BlockSpec, ...]
    norm_eps: float
    tied: bool
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope: Rope
    embed_scale: float = 1.0
    logits: LogitShape = PLAIN_LOGITS
    per_layer_vocab: int = 0
    max_positions: int = 2048
    end_token_ids: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return len(self.blocks)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a recurrent state, which can read one continuation of a text at a time."""
        return any(isinstance(block.mixer, DeltaSpec) for block in self.blocks)


def check_aux_layers(aux_layers: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Checks layer boundaries, 0 (embeddings) to `layers`, at which a target's hidden states are taken.

    Returns:
      `aux_layers`, or the default (2, n//2, n-3) of EAGLE-3's engines where it is empty.

    Raises:
      UserError: unless the boundaries rise strictly within 0..layers, or for an empty tuple and fewer than 7 layers,
        for which the defaults do not.
    """
    if not aux_layers and layers < 7:
        raise UserError(
            f"The target has {layers} layers, too few for the default auxiliary layers 2, n//2, n-3: "
            "name them with --target.aux-layers."
        )
    aux_layers = aux_layers or (2, layers // 2, layers - 3)
    if any(a >= b for a, b in itertools.pairwise(aux_layers)) or aux_layers[0] < 0 or aux_layers[-1] > layers:
        raise UserError(
            f"--target.aux-layers {' '.join(map(str, aux_layers))}: layer boundaries must rise strictly, from 0 "
            f"(embeddings) to {layers} (after the last of the target's {layers} layers)."
        )
    return aux_layers
