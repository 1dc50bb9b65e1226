"""What passes between the rooms of jeagle, and nothing else.

Axis letters are part of names: B rows, T positions, N live slots, K TTT steps, M teacher positions, H target hidden
width, W draft hidden width, V target vocabulary, D draft vocabulary, A tapped layers, P entries of a truncated
teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Batch(NamedTuple):
    """Packed rows of tokens.

    Attributes:
      tokens_BT: token ids; 0 on padding.
      segments_BT: 0 on padding, 1.. for the documents of a row, rising along it.
      positions_BT: position within the document, from 0; the RoPE position of the target.
      supervised_BT: whether this token is part of an answer, the token that ends it included.
    """

    tokens_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    supervised_BT: Bool[Array, "B T"]


class TopK(NamedTuple):
    """The P most likely tokens after each position, of the target's whole vocabulary: a truncated teacher.

    Attributes:
      ids_BTP: token ids, likeliest first.
      log_probs_BTP: log of their probabilities over the whole vocabulary, float32 (float16 in a store).
      rest_BT: what all other tokens have together, float32, 0 to 1.
    """

    ids_BTP: Int[Array, "B T P"]
    log_probs_BTP: Float[Array, "B T P"]
    rest_BT: Float[Array, "B T"]


class Features(NamedTuple):
    """What the frozen target says about a batch, computed just now or read from a cache.

    Attributes:
      taps_BTAH: the residual stream after each tapped number of layers, shallow to deep, un-normed.
      teacher: what the target's lm_head reads, [B, T, H]: the stream after the last layer, after the final norm. Or
        what is left of its distributions, only where asked for.
      greedy_BT: argmax of the target's logits over its whole vocabulary; only where asked for, 0 elsewhere.
      lse_BT: logsumexp of the same logits, float32; only where asked for, 0 elsewhere.
    """

    aux_BTAH: Float[Array, "B T A H"]
    teacher: Float[Array, "B T H"] | TopK
    greedy_BT: Int[Array, "B T"]
    lse_BT: Float[Array, "B T"]


class Tables(NamedTuple):
    """The target's frozen rows that a draft is trained and served with.

    Attributes:
      embed_VW: raw embedding rows, as servers read them.
      head_DH: rows of the target's lm_head for the draft vocabulary.
      draft_to_target_D: token id of each draft vocabulary entry, strictly rising.
    """

    embed_VW: Float[Array, "V W"]
    head_DH: Float[Array, "D H"]
    draft_to_target_D: Int[Array, " D"]


class LogitShape(NamedTuple):
    """What a target's family does to its logits: static, so that most targets pay nothing for it.

    Attributes:
      scale: logits are multiplied with it. cap: then they become cap * tanh(logits / cap); 0 = they stay.
    """

    scale: float = 1.0
    cap: float = 0.0

    def __call__(self, logits: Array) -> Array:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.cap * jnp.tanh(logits / self.cap) if self.cap else logits


PLAIN_LOGITS = LogitShape()


class Predictions(NamedTuple):
    """A draft's states at the live slots of every TTT step, before any vocabulary.

    Attributes:
      hidden_KBNW: what the draft's lm_head reads (after the final norm).
      taught_by_KBN: position of the token that the slot reads, whose target distribution teaches it.
      counts_KBN: whether the slot counts at this step.
    """

    hidden_KBNW: Float[Array, "K B N W"]
    taught_by_KBN: Int[Array, "K B N"]
    counts_KBN: Bool[Array, "K B N"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding, as Hugging Face configs describe it.

    Attributes:
      theta: base of the frequencies.
      scaling: the rest of `rope_parameters` as sorted pairs: (("factor", 8.0), ("rope_type", "llama3"), ...); empty
        for plain RoPE.
    """

    theta: float = 10000.0
    scaling: tuple[tuple[str, Any], ...] = ()

    @property
    def scaling_dict(self) -> dict[str, Any]:
        return dict(self.scaling)


LayerType = Literal["full_attention", "sliding_attention"]


@dataclasses.dataclass(frozen=True)
class DraftSpec:
    """Everything that shapes an EAGLE-3 draft; what is trained, saved, exported and served agree on it.

    Attributes:
      target_width: H, width of the tapped hidden states.
      width: W, the draft's own width; equal to H unless the draft carries its own embedding.
      target_vocab: V.
      draft_vocab: D.
      taps: layer boundaries that are tapped: L means after L decoder layers, 0 the embeddings. Rising.
      heads, kv_heads, head_dim, mlp_width, layers: of the draft's decoder layers.
      norm_eps: epsilon of every RMSNorm in the draft.
      rope: the draft's rotary embedding.
      max_positions: longest sequence that the draft is told of at serving.
      norm_before_residual: the residual is the normed feature instead of the raw one (layer 0).
      norm_before_fc: one RMSNorm over the concatenated taps (EAGLE-3.1).
      fc_norm: one RMSNorm for each tap; excludes norm_before_fc.
      carry_normed: the state handed to the next step is the normed one (speculators' `norm_output`).
      head_norm: the final norm stands before lm_head (SpecForge's `norm_output`); true in the plain form.
      qk_norm: RMSNorm over each query and key head.
      attention_bias: biases on q, k, v (and o).
      sliding_window: keys further back than this are not attended to by layers that slide; 0 = no layer slides.
      layer_types: attention of each layer; empty: all layers slide if there is a sliding window, else none does.
      end_token_ids: ids that end an answer.
    """

    target_width: int
    width: int
    target_vocab: int
    draft_vocab: int
    aux_layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    layers: int = 1
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    max_positions: int = 2048
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    carry_normed: bool = False
    head_norm: bool = True
    qk_norm: bool = False
    attention_bias: bool = False
    sliding_window: int = 0
    end_token_ids: tuple[int, ...] = ()
    layer_types: tuple[LayerType, ...] = ()

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer; 0 where it attends to all earlier keys."""
        if not self.layer_types:
            return (self.sliding_window,) * self.layers
        return tuple(self.sliding_window if kind == "sliding_attention" else 0 for kind in self.layer_types)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> DraftSpec:
        rope = Rope(tree["rope"]["theta"], tuple((k, _frozen(v)) for k, v in tree["rope"]["scaling"]))
        fields = {k: _frozen(v) for k, v in tree.items() if k != "rope"}
        if "taps" in fields:  # what draft.json called them before version 0.1
            fields["aux_layers"] = fields.pop("taps")
        return cls(**fields, rope=rope)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
