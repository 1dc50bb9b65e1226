"""What passes between the rooms of jeagle, and nothing else.

Axis letters are part of names: B rows, T positions, N live slots, K TTT steps, M teacher positions, H the target's
hidden size, W the draft's hidden size, V the target's vocabulary, D the draft vocabulary, A aux layers, P tokens of a
truncated teacher. docs/glossary.md lists all of them.
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
      segments_BT: the documents of a row, numbered from 1 in their order; 0 on padding.
      positions_BT: position within the document, from 0, which is the RoPE position of the target.
      supervised_BT: the loss mask. True where the token is part of an answer, the token that ends it included.
    """

    tokens_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    supervised_BT: Bool[Array, "B T"]


class TopK(NamedTuple):
    """A truncated teacher: the P most likely tokens after each position, out of the target's whole vocabulary.

    Attributes:
      ids_BTP: token ids, the most likely first.
      log_probs_BTP: log of their probabilities over the whole vocabulary, float32 (float16 in a store).
      rest_BT: the probability of all other tokens together, float32, from 0 to 1.
    """

    ids_BTP: Int[Array, "B T P"]
    log_probs_BTP: Float[Array, "B T P"]
    rest_BT: Float[Array, "B T"]


class Features(NamedTuple):
    """The hidden states of the frozen target for a batch, computed just now or read from a store.

    Attributes:
      aux_BTAH: the aux hidden states, which are the residual stream after each aux layer, low to high, without a norm.
      teacher: the last hidden states [B, T, H], which the target's lm_head reads: the residual stream after the last
        layer and the final norm. Or the most likely tokens of the target's distributions, at the wanted positions.
      greedy_BT: argmax of the target's logits over its whole vocabulary at the wanted positions, 0 elsewhere.
      lse_BT: logsumexp of the same logits, float32, at the wanted positions, 0 elsewhere.
    """

    aux_BTAH: Float[Array, "B T A H"]
    teacher: Float[Array, "B T H"] | TopK
    greedy_BT: Int[Array, "B T"]
    lse_BT: Float[Array, "B T"]


class Tables(NamedTuple):
    """The frozen tables of the target that a draft is trained and served with.

    Attributes:
      embed_VW: the embedding, without the scaling that some families apply, as servers read it.
      head_DH: the rows of the target's lm_head for the draft vocabulary.
      draft_to_target_D: the token id of each entry of the draft vocabulary, strictly rising.
    """

    embed_VW: Float[Array, "V W"]
    head_DH: Float[Array, "D H"]
    draft_to_target_D: Int[Array, " D"]


class CacheView(NamedTuple):
    """Where tokens go in a KV cache of S slots and what they attend to, if a slot is not the position of its token.

    The tokens of a draft tree are such: several of them continue the same text and share a position.

    Attributes:
      slots_BT: the slot that each token's key and value are written to.
      key_positions_BS: the position of each slot's token.
      visible_BTS: whether token t may attend to slot s, apart from what windows and later positions exclude.
    """

    slots_BT: Int[Array, "B T"]
    key_positions_BS: Int[Array, "B S"]
    visible_BTS: Bool[Array, "B T S"]


class LogitShape(NamedTuple):
    """How a target's family scales and caps its logits. It is static, so that it costs most targets nothing.

    Attributes:
      scale: the logits are multiplied by it.
      cap: the scaled logits become cap * tanh(logits / cap); 0 does not cap them.
    """

    scale: float = 1.0
    cap: float = 0.0

    def __call__(self, logits: Array) -> Array:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.cap * jnp.tanh(logits / self.cap) if self.cap else logits


PLAIN_LOGITS = LogitShape()


class Predictions(NamedTuple):
    """A draft's predictions at the live slots of every TTT step, before its lm_head.

    Attributes:
      hidden_KBNW: the hidden states that the draft's lm_head reads, after the final norm.
      taught_by_KBN: the position of the token that the slot reads; the target's distribution there is the teacher.
      counts_KBN: whether the slot counts at this step.
    """

    hidden_KBNW: Float[Array, "K B N W"]
    taught_by_KBN: Int[Array, "K B N"]
    counts_KBN: Bool[Array, "K B N"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding, as configurations of Hugging Face describe it.

    Attributes:
      theta: the base of the frequencies.
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
    """The architecture of an EAGLE-3 draft. Training, checkpoints, exports and servers agree on it.

    Attributes:
      target_width: H, the target's hidden size.
      width: W, the draft's hidden size; equal to H unless the draft has an embedding of its own.
      target_vocab: V.
      draft_vocab: D.
      aux_layers: layer boundaries of the target whose hidden states the draft reads, rising: L is the output of decoder
        layer L, 0 the embeddings.
      heads, kv_heads, head_dim, mlp_width, layers: of the draft's decoder layers.
      norm_eps: epsilon of every RMSNorm in the draft.
      rope: the draft's rotary embedding.
      max_positions: the longest sequence, which the configuration of an export names.
      norm_before_residual: the residual is the normed feature instead of the raw one (layer 0).
      norm_before_fc: one RMSNorm over the concatenated aux hidden states (EAGLE-3.1).
      fc_norm: one RMSNorm for each aux hidden state; excludes norm_before_fc.
      carry_normed: the next step reads the normed state (speculators' `norm_output`).
      head_norm: the final norm stands before lm_head (SpecForge's `norm_output`); true for every engine.
      qk_norm: RMSNorm over each query and key head.
      attention_bias: biases on q, k, v (and o).
      sliding_window: the number of most recent keys that windowed layers attend to; 0 where no layer is windowed.
      layer_types: the attention of each layer; empty where all layers are windowed, or none is.
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
