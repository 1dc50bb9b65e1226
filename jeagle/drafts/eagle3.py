"""The EAGLE-3 draft: fused taps and a token's embedding through one (or more) decoder layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.drafts.dense import dense, scaled_dense
from jeagle.drafts.remat import STATE, kept
from jeagle.interfaces import DraftSpec
from jeagle.layers import GatedMLP, rms_norm, rotate_by
from jeagle.runtime.numerics import rows_product


class Read(NamedTuple):
    """What a layer's attention projects: the state, in the first layer beside a token's embedding.

    Attributes:
      hidden: normed state [..., W], in the type of the products.
      embedded: embedding of the token [..., W], divided by its root mean square but not scaled; None past layer 0.
      scale: weight [W] of the embedding's norm; None past layer 0.
    """

    hidden: jax.Array
    embedded: jax.Array | None = None
    scale: jax.Array | None = None


class Stream(NamedTuple):
    """The residual stream between layers, [..., W]: as it is summed, and in the type of the products for norms to read.

    A step keeps the second for its backward pass, once for all who read it.
    """

    whole: jax.Array
    read: jax.Array

    @classmethod
    def of(cls, hidden: jax.Array, dtype: Any) -> Stream:
        return cls(hidden, kept(hidden, dtype, STATE))


class Attention(nnx.Module):
    """Projections and rotation; who attends to whom is the caller's to say."""

    def __init__(self, spec: DraftSpec, inputs: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = nnx.Param(init(rngs.params(), (inputs, query)))
        self.k_proj = nnx.Param(init(rngs.params(), (inputs, key)))
        self.v_proj = nnx.Param(init(rngs.params(), (inputs, key)))
        self.o_proj = nnx.Param(init(rngs.params(), (query, spec.width)))
        if spec.attention_bias:
            self.q_bias = nnx.Param(jnp.zeros(query))
            self.k_bias = nnx.Param(jnp.zeros(key))
            self.v_bias = nnx.Param(jnp.zeros(key))
            self.o_bias = nnx.Param(jnp.zeros(spec.width))
        if spec.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(spec.head_dim))
            self.k_norm = nnx.Param(jnp.ones(spec.head_dim))
        self.spec, self.dtype = spec, dtype

    def queries(self, read: Read, positions: jax.Array) -> jax.Array:
        """Rotated [..., Q, C]."""
        return self._rotated(read, positions, "q")

    def keys_values(self, read: Read, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and plain values, [..., G, C] each."""
        return self._rotated(read, positions, "k"), self._project(read, "v")

    def out(self, mixed: jax.Array) -> jax.Array:
        y = dense(mixed.reshape(*mixed.shape[:-2], -1).astype(self.dtype), self.o_proj[...])
        return y + self.o_bias[...] if self.spec.attention_bias else y

    def _rotated(self, read: Read, positions: jax.Array, which: str) -> jax.Array:
        heads = self._project(read, which)
        if self.spec.qk_norm:
            heads = rms_norm(heads, getattr(self, f"{which}_norm")[...], self.spec.norm_eps)
        # What turns with the length (LongRoPE, dynamic) turns by that of the text so far, as in decoding with a cache.
        return rotate_by(self.spec.rope, heads, positions, positions + 1)

    def _project(self, read: Read, which: str) -> jax.Array:
        kernel, width = getattr(self, f"{which}_proj")[...], read.hidden.shape[-1]
        y = dense(read.hidden, kernel[-width:])
        if read.embedded is not None:
            y = y + scaled_dense(read.embedded, read.scale, kernel[:width])
        if self.spec.attention_bias:
            y = y + getattr(self, f"{which}_bias")[...]
        y = kept(y, self.dtype)
        return y.reshape(*y.shape[:-1], -1, self.spec.head_dim)


class Layer(nnx.Module):
    """One decoder layer. The first reads the normed embedding beside the normed state, twice the width."""

    def __init__(self, spec: DraftSpec, first: bool, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = nnx.Param(jnp.ones(spec.width))
        if first:
            self.hidden_norm = nnx.Param(jnp.ones(spec.width))
        self.post_attention_layernorm = nnx.Param(jnp.ones(spec.width))
        self.self_attn = Attention(spec, 2 * spec.width if first else spec.width, dtype, rngs)
        self.mlp = GatedMLP(spec.width, spec.mlp_width, dtype, rngs)
        self.spec, self.first, self.dtype = spec, first, dtype

    def inputs(self, embedded: jax.Array, stream: Stream) -> tuple[Read, jax.Array]:
        """-> (what attention reads, the residual)."""
        eps = self.spec.norm_eps
        if not self.first:
            return Read(rms_norm(stream.read, self.input_layernorm[...], eps).astype(self.dtype)), stream.whole
        normed = rms_norm(stream.read, self.hidden_norm[...], eps)
        plain = jax.lax.stop_gradient(rms_norm(embedded, jnp.ones(()), eps)).astype(self.dtype)
        read = Read(normed.astype(self.dtype), plain, self.input_layernorm[...])
        return read, normed if self.spec.norm_before_residual else stream.whole

    def finish(self, residual: jax.Array, mixed: jax.Array) -> jax.Array:
        """Output projection, residual, MLP: the layer's output."""
        x, normed = self.attended(residual, mixed)
        gate, up = (kept(dense(normed, kernel[...]), self.dtype) for kernel in (self.mlp.gate_proj, self.mlp.up_proj))
        total = jnp.promote_types(self.dtype, jnp.float32)
        inner = jax.nn.silu(gate.astype(total)) * up.astype(total)
        return x + dense(inner.astype(self.dtype), self.mlp.down_proj[...])

    def attended(self, residual: jax.Array, mixed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output projection and residual: (the stream, what the MLP reads of it)."""
        x = residual + self.self_attn.out(mixed)
        normed = rms_norm(kept(x, self.dtype, STATE), self.post_attention_layernorm[...], self.spec.norm_eps)
        return x, normed.astype(self.dtype)


class Eagle3(nnx.Module):
    """The draft's parameters and its pieces; `ttt.unroll` trains with them, `chain.ChainDraft` decodes.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.1; the switches of `DraftSpec` are the dialects of its reproductions.
    """

    def __init__(self, spec: DraftSpec, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        fused = len(spec.aux_layers) * spec.target_width
        self.fc = nnx.Param(init(rngs.params(), (fused, spec.width)))
        if spec.norm_before_fc:
            self.input_norm = nnx.Param(jnp.ones(fused))
        if spec.fc_norm:
            self.fc_norm = nnx.List([nnx.Param(jnp.ones(spec.target_width)) for _ in spec.aux_layers])
        self.layers = nnx.List([Layer(spec, i == 0, dtype, rngs) for i in range(spec.layers)])
        self.norm = nnx.Param(jnp.ones(spec.width))
        self.lm_head = nnx.Param(init(rngs.params(), (spec.draft_vocab, spec.width)))
        self.spec, self.dtype = spec, dtype

    def fuse(self, aux: jax.Array) -> jax.Array:
        """Taps [..., A, H] -> the first state g [..., W]."""
        if self.spec.fc_norm:
            parts = [rms_norm(aux[..., a, :], w[...], self.spec.norm_eps) for a, w in enumerate(self.fc_norm)]
            aux = jnp.stack(parts, axis=-2)
        fused = aux.reshape(*aux.shape[:-2], -1)
        if self.spec.norm_before_fc:
            fused = rms_norm(fused, self.input_norm[...], self.spec.norm_eps)
        return dense(fused.astype(self.dtype), self.fc[...])

    def finish(self, stream: Stream) -> tuple[jax.Array, jax.Array]:
        """The last layer's output -> (what lm_head reads, the state that the next step starts from)."""
        normed = rms_norm(stream.read, self.norm[...], self.spec.norm_eps)
        return normed if self.spec.head_norm else stream.whole, normed if self.spec.carry_normed else stream.whole

    def logits(self, hidden: jax.Array) -> jax.Array:
        """What lm_head reads [..., W] -> float32 logits [..., D] over the draft vocabulary."""
        return rows_product(hidden.astype(self.dtype), self.lm_head[...].astype(self.dtype), rows=True)
