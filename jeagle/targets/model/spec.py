"""The shape of a target, whatever its family: what `Decoder` runs, and nothing about files."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jeagle.interfaces import PLAIN_LOGITS, LogitShape, Rope


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Queries grow with their position: times 1 + beta * log(1 + floor((position + start) / span)).

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
      rope: None for a layer without positions.
      interleaved: rotated pairs are neighbours (0, 1), (2, 3), not halves.
      window: how many positions back a query sees, itself included; 0 = all.
      chunk: a query sees only keys of its own chunk of so many positions; 0 = all.
      scale: of the scores; 0 = 1 / sqrt(C).
      soft_cap: scores become cap * tanh(scores / cap); 0 = none.
      qk_norm: "head": RMSNorm over each head; "whole": over all heads together; "rotated": over each head after the
        rotation, without weights.
      value_norm: RMSNorm without weights over each value head.
      values_are_keys: values are the unrotated, unnormed keys (one projection for both).
      sinks: a learnt score per head that takes its share of the softmax and gives nothing.
      gated: the output is multiplied with sigmoid of a projection of the layer's input.
      keep_as, read_from: Gemma's shared keys and values: this layer's are kept under a name, or it has none of its own
        and reads those kept there.
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
    qk_norm: Literal["", "head", "whole", "rotated"] = ""
    value_norm: bool = False
    values_are_keys: bool = False
    sinks: bool = False
    gated: bool = False
    temperature: Temperature | None = None
    keep_as: str = ""
    read_from: str = ""


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention: keys and values are made from one narrow latent, which is all that is cached.

    Attributes:
      q_rank: width of the queries' latent; 0 = queries are projected at once.
      kv_rank: width of the keys' and values' latent.
      nope_dim, rope_dim: parts of a key without and with rotation; the rotated one is shared by all heads.
      value_dim: of a value head.

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
    scale: float = 0.0
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """Gated delta rule: a state [key_dim, value_dim] per value head in place of a cache.

    Source: Gated Delta Networks (arXiv 2412.06464), as in Qwen3-Next.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    width: int
    activation: str = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class RouterSpec:
    """Which experts a token goes to, and with what weight.

    Attributes:
      scores: "softmax" over all experts, "sigmoid" of each, or "chosen": softmax over the chosen ones alone.
      renormalised: the chosen weights are divided by their sum.
      scale: what the weights are multiplied with at the end.
      groups, chosen_groups: experts come only from the best groups; 0 = no groups.
      group_score: a group is as good as its best expert ("max") or the sum of its best two ("top2").
      bias: the router's projection has a bias.
      correction: a bias that takes part in choosing and not in weighing.
      weighs_input: the weight multiplies what goes into the expert, not what comes out (Llama 4).
      normed: the router reads its own RMSNorm of the layer's residual, and each expert has a scale (Gemma 4).
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
    """A mixture of `count` gated MLPs of `width`, `chosen` of them for each token.

    Attributes:
      shared_width: an MLP that every token goes through as well; 0 = none.
      shared_gate: its output is multiplied with sigmoid of a projection to one number.
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
      norms: "pre": before mixer and MLP; "post": after them, before the residual is added; "both".
      residual: what mixer's and MLP's outputs are multiplied with before they are added.
      per_layer_width: P: width of Gemma 4's per-layer inputs; 0 = none.
      scaled: the layer's output is multiplied with a stored number (Gemma 4).
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
    """What a decoder needs to know of a target.

    Attributes:
      architecture: the name in Hugging Face's config.json.
      width: H. vocab: V. norm_eps: of every RMSNorm.
      blocks: the layers, one by one.
      tied: whether lm_head is the embedding.
      embed_scale: what embedding rows are multiplied with (rounded to the weights' type, as the families do).
      logits: what is done to them after lm_head.
      per_layer_vocab: rows of Gemma 4's per-layer embedding.
      heads, kv_heads, head_dim, mlp_width, rope: of the plain Llama layer that a draft of this target is.
      max_positions: longest sequence the target was made for.
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
        """L."""
        return len(self.blocks)
