"""The EAGLE-3 draft: fused aux hidden states and a token's embedding through one decoder layer, or several.

`advance` runs it as it runs at serving: with a KV cache, from one hidden state to the next; `ttt.unroll` trains it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jeagle.drafts.trained_products import scaled_linear, trained_linear
from jeagle.interfaces import DraftSpec, Tables
from jeagle.layers import AttentionMask, masked_attention, rms_norm, rotate_by
from jeagle.runtime.xla_workarounds import flat_matmul, save_residual

PRODUCT, RESIDUAL_STREAM = "product", "residual_stream"
"""Names under which rematerialisation saves results of a TTT step (see `ttt.unroll`)."""


class AttentionInput(NamedTuple):
    """What a layer's attention projects: the hidden state, in the first layer beside a token's embedding.

    Attributes:
      hidden: normed hidden state [..., W], in the type of the products.
      embedded: the token's embedding [..., W] divided by its root mean square, not scaled; None past the first layer.
      scale: weight [W] of the embedding's norm; None past the first layer.
    """

    hidden: jax.Array
    embedded: jax.Array | None = None
    scale: jax.Array | None = None


class ResidualStream(NamedTuple):
    """The residual stream [..., W] between layers.

    Attributes:
      summed: float32 or better; layers add to it.
      rounded: the same in the type of the products, for norms to read. A TTT step saves it once for all its readers.
    """

    summed: jax.Array
    rounded: jax.Array

    @classmethod
    def of(cls, hidden: Float[Array, "*rows W"], dtype: Any) -> ResidualStream:
        return cls(hidden, save_residual(hidden.astype(dtype), RESIDUAL_STREAM))


class DraftAttention(nnx.Module):
    """Projections, norms and rotation of an attention layer; the callers decide which keys a query attends to."""

    def __init__(self, spec: DraftSpec, inputs: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        shapes = {"q": (inputs, query), "k": (inputs, key), "v": (inputs, key), "o": (query, spec.width)}
        for which, shape in shapes.items():
            setattr(self, f"{which}_proj", nnx.Param(init(rngs.params(), shape)))
            if spec.attention_bias:
                setattr(self, f"{which}_bias", nnx.Param(jnp.zeros(shape[1])))
        if spec.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(spec.head_dim))
            self.k_norm = nnx.Param(jnp.ones(spec.head_dim))
        self.spec, self.dtype = spec, dtype

    def queries(self, read: AttentionInput, positions: Int[Array, "*rows"]) -> Float[Array, "*rows Q C"]:
        """Queries, rotated by their positions."""
        return self._rotated(read, positions, "q")

    def keys_values(
        self, read: AttentionInput, positions: Int[Array, "*rows"]
    ) -> tuple[Float[Array, "*rows G C"], Float[Array, "*rows G C"]]:
        """Keys, rotated by their positions, and values."""
        return self._rotated(read, positions, "k"), self._project(read, "v")

    def out(self, mixed: Float[Array, "*rows Q C"]) -> Float[Array, "*rows W"]:
        """The output projection of the heads' mixed values."""
        y = trained_linear(mixed.reshape(*mixed.shape[:-2], -1).astype(self.dtype), self.o_proj[...])
        return y + self.o_bias[...] if self.spec.attention_bias else y

    def _rotated(self, read: AttentionInput, positions: jax.Array, which: str) -> jax.Array:
        heads = self._project(read, which)
        if self.spec.qk_norm:
            heads = rms_norm(heads, getattr(self, f"{which}_norm")[...], self.spec.norm_eps)
        # A rotation that depends on the length (LongRoPE, dynamic) takes that of the text so far, as a KV cache does.
        return rotate_by(self.spec.rope, heads, positions, positions + 1)

    def _project(self, read: AttentionInput, which: str) -> jax.Array:
        kernel, width = getattr(self, f"{which}_proj")[...], read.hidden.shape[-1]
        y = trained_linear(read.hidden, kernel[-width:])
        if read.embedded is not None:
            y = y + scaled_linear(read.embedded, read.scale, kernel[:width])
        if self.spec.attention_bias:
            y = y + getattr(self, f"{which}_bias")[...]
        y = save_residual(y.astype(self.dtype), PRODUCT)
        return y.reshape(*y.shape[:-1], -1, self.spec.head_dim)


class DraftMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, spec: DraftSpec, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.gate_proj = nnx.Param(init(rngs.params(), (spec.width, spec.mlp_width)))
        self.up_proj = nnx.Param(init(rngs.params(), (spec.width, spec.mlp_width)))
        self.down_proj = nnx.Param(init(rngs.params(), (spec.mlp_width, spec.width)))
        self.dtype = dtype

    def __call__(self, normed: Float[Array, "*rows W"]) -> Float[Array, "*rows W"]:
        gate, up = (
            save_residual(trained_linear(normed, kernel[...]).astype(self.dtype), PRODUCT)
            for kernel in (self.gate_proj, self.up_proj)
        )
        sum_type = jnp.promote_types(self.dtype, jnp.float32)
        inner = jax.nn.silu(gate.astype(sum_type)) * up.astype(sum_type)
        return trained_linear(inner.astype(self.dtype), self.down_proj[...])


class DraftLayer(nnx.Module):
    """One decoder layer. The first layer reads the normed embedding beside the normed state: twice the width."""

    def __init__(self, spec: DraftSpec, first: bool, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = nnx.Param(jnp.ones(spec.width))
        if first:
            self.hidden_norm = nnx.Param(jnp.ones(spec.width))
        self.post_attention_layernorm = nnx.Param(jnp.ones(spec.width))
        self.self_attn = DraftAttention(spec, 2 * spec.width if first else spec.width, dtype, rngs)
        self.mlp = DraftMLP(spec, dtype, rngs)
        self.spec, self.first, self.dtype = spec, first, dtype

    def inputs(
        self, embedded: Float[Array, "*rows W"], stream: ResidualStream
    ) -> tuple[AttentionInput, Float[Array, "*rows W"]]:
        """(What attention projects, the residual that its output is added to)."""
        eps = self.spec.norm_eps
        if not self.first:
            normed = rms_norm(stream.rounded, self.input_layernorm[...], eps)
            return AttentionInput(normed.astype(self.dtype)), stream.summed
        normed = rms_norm(stream.rounded, self.hidden_norm[...], eps)
        unscaled = jax.lax.stop_gradient(rms_norm(embedded, jnp.ones(()), eps)).astype(self.dtype)
        read = AttentionInput(normed.astype(self.dtype), unscaled, self.input_layernorm[...])
        return read, normed if self.spec.norm_before_residual else stream.summed

    def attended(
        self, residual: Float[Array, "*rows W"], mixed: Float[Array, "*rows Q C"]
    ) -> tuple[Float[Array, "*rows W"], Float[Array, "*rows W"]]:
        """(The residual stream after attention, the normed stream that the MLP reads)."""
        x = residual + self.self_attn.out(mixed)
        rounded = save_residual(x.astype(self.dtype), RESIDUAL_STREAM)
        normed = rms_norm(rounded, self.post_attention_layernorm[...], self.spec.norm_eps)
        return x, normed.astype(self.dtype)

    def finish(self, residual: Float[Array, "*rows W"], mixed: Float[Array, "*rows Q C"]) -> Float[Array, "*rows W"]:
        """The layer's output from the heads' mixed values: output projection, residual, MLP, residual."""
        x, normed = self.attended(residual, mixed)
        return x + self.mlp(normed)


class Eagle3(nnx.Module):
    """The draft's parameters and its parts; `ttt.unroll` trains with them and `advance` decodes with them.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.1; the switches of `DraftSpec` are where its reproductions differ.
    """

    def __init__(self, spec: DraftSpec, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        aux_width = len(spec.aux_layers) * spec.target_width
        self.fc = nnx.Param(init(rngs.params(), (aux_width, spec.width)))
        if spec.norm_before_fc:
            self.input_norm = nnx.Param(jnp.ones(aux_width))
        if spec.fc_norm:
            self.fc_norm = nnx.List([nnx.Param(jnp.ones(spec.target_width)) for _ in spec.aux_layers])
        self.layers = nnx.List([DraftLayer(spec, i == 0, dtype, rngs) for i in range(spec.layers)])
        self.norm = nnx.Param(jnp.ones(spec.width))
        self.lm_head = nnx.Param(init(rngs.params(), (spec.draft_vocab, spec.width)))
        self.spec, self.dtype = spec, dtype

    def fuse(self, aux: Float[Array, "*rows A H"]) -> Float[Array, "*rows W"]:
        """The aux hidden states of a position -> the first hidden state g of its slot."""
        if self.spec.fc_norm:
            parts = [rms_norm(aux[..., a, :], w[...], self.spec.norm_eps) for a, w in enumerate(self.fc_norm)]
            aux = jnp.stack(parts, axis=-2)
        concatenated = aux.reshape(*aux.shape[:-2], -1)
        if self.spec.norm_before_fc:
            concatenated = rms_norm(concatenated, self.input_norm[...], self.spec.norm_eps)
        return trained_linear(concatenated.astype(self.dtype), self.fc[...])

    def finish(self, stream: ResidualStream) -> tuple[Float[Array, "*rows W"], Float[Array, "*rows W"]]:
        """The last layer's output -> (what lm_head reads, the hidden state that the next TTT step starts from)."""
        normed = rms_norm(stream.rounded, self.norm[...], self.spec.norm_eps)
        return normed if self.spec.head_norm else stream.summed, normed if self.spec.carry_normed else stream.summed

    def logits(self, hidden: Float[Array, "*rows W"]) -> Float[Array, "*rows D"]:
        """What lm_head reads -> logits over the draft vocabulary, float32 or better."""
        return flat_matmul(hidden.astype(self.dtype), self.lm_head[...].astype(self.dtype), transposed=True)


class DraftCache(NamedTuple):
    """One layer's keys and values of S slots."""

    keys_BSGC: Float[Array, "B S G C"]
    values_BSGC: Float[Array, "B S G C"]


def empty_cache(draft: Eagle3, rows: int, length: int) -> tuple[DraftCache, ...]:
    """A cache of `length` slots for each of `rows` sequences, one entry per layer."""
    shape = (rows, length, draft.spec.kv_heads, draft.spec.head_dim)
    dtype = jnp.promote_types(draft.dtype, jnp.float32)
    return tuple(DraftCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in draft.layers)


def advance(
    draft: Eagle3,
    tables: Tables,
    hidden_BTW: Float[Array, "B T W"],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: tuple[DraftCache, ...],
) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"], tuple[DraftCache, ...]]:
    """The slots at `positions_BT` each read a hidden state and a token.

    Keys and values are written at the positions. A slot attends to the cached slots up to its own position, so that
    slots written for rejected tokens are overwritten before any slot attends to them.

    Args:
      hidden_BTW: `draft.fuse(aux)` where the target has read the position; else the draft's own previous state.
      tokens_BT: the token after each position.
      positions_BT: slot t has position t, by which it rotates, as in vLLM and SGLang.

    Returns:
      (what lm_head reads, the hidden states to continue from, the cache with the new slots).

    Source: EAGLE-3 (arXiv 2503.01840), section 3.1.
    """
    rows = jnp.arange(tokens_BT.shape[0])[:, None]
    length = cache[0].keys_BSGC.shape[1]
    mask = AttentionMask(positions_BT, jnp.broadcast_to(jnp.arange(length), (tokens_BT.shape[0], length)))
    embedded = tables.embed_VW[tokens_BT].astype(jnp.float32)
    stream, new_cache = ResidualStream.of(hidden_BTW, draft.dtype), []
    for layer, past, window in zip(draft.layers, cache, draft.spec.windows, strict=True):
        read, residual = layer.inputs(embedded, stream)
        new = layer.self_attn.keys_values(read, positions_BT)
        past = DraftCache(*(cached.at[rows, positions_BT].set(x) for cached, x in zip(past, new, strict=True)))
        queries = layer.self_attn.queries(read, positions_BT)
        mixed = masked_attention(queries, *past, mask, draft.dtype, window=window)
        stream = ResidualStream.of(layer.finish(residual, mixed), draft.dtype)
        new_cache.append(past)
    for_head, next_hidden = draft.finish(stream)
    return for_head, next_hidden, tuple(new_cache)


def greedy_token(draft: Eagle3, tables: Tables, for_head: Float[Array, "*rows W"]) -> Int[Array, "*rows"]:
    """The draft's most likely token for what lm_head reads, as an id of the target's vocabulary.

    It is -1, which no target accepts, where the logits are not finite.
    """
    logits = draft.logits(for_head)
    return jnp.where(jnp.isfinite(logits.sum(axis=-1)), tables.draft_to_target_D[jnp.argmax(logits, axis=-1)], -1)
