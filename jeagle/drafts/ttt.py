"""Training-time test (TTT): K steps in which a draft reads its own hidden states, at the live slots only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jeagle import align
from jeagle.align import Selected, take_rows
from jeagle.drafts.eagle3 import PRODUCT, RESIDUAL_STREAM, DraftLayer, DraftMLP, Eagle3, ResidualStream
from jeagle.drafts.trained_products import MLPKernels, chunked_mlp
from jeagle.drafts.ttt_attention import ATTENTION, Backend, BackwardCarry, attend_ttt, deliver_to_backward
from jeagle.interfaces import Batch, Predictions


class LayerContext(NamedTuple):
    """What all TTT steps of a layer share.

    Attributes:
      keys_BGTC, values_BGTC: of step 0, at every position.
      first_BN: the first position whose step-0 key a slot attends to at step 0; the last one is its own.
      window: the sliding window that moves on with the steps; 0 where it stays as at step 0, or there is none.
      mlp: the kernels of the MLP without gradient, where `chunked_mlp` computes it; else None.
    """

    keys_BGTC: Float[Array, "B G T C"]
    values_BGTC: Float[Array, "B G T C"]
    first_BN: Int[Array, "B N"]
    window: int
    mlp: MLPKernels | None

    def visible(self, k: jax.Array, last_BN: jax.Array, own_steps: int) -> tuple[jax.Array, jax.Array]:
        """At step k: (the first position [B, N] of the step-0 keys that a slot attends to, bool [J] which of its own
        keys of steps 1 to J)."""
        step_J = jnp.arange(1, own_steps + 1)
        if not self.window:
            return self.first_BN, step_J <= k
        first_BN = jnp.maximum(self.first_BN, last_BN + k - self.window + 1)
        return first_BN, (step_J <= k) & (step_J > k - self.window)


class LayerState(NamedTuple):
    """What a layer hands from one TTT step to the next.

    Attributes:
      keys_JBGNC, values_JBGNC: the slots' own keys and values of steps 1..J.
      backward_carry: hands those of the last step to every step's backward pass.
      mlp: the kernels that `chunked_mlp` passes on to collect their gradient, where it computes the MLP; else None.
    """

    keys_JBGNC: Float[Array, "J B G N C"]
    values_JBGNC: Float[Array, "J B G N C"]
    backward_carry: BackwardCarry
    mlp: MLPKernels | None = None

    def with_step(self, k: jax.Array, keys_BNGC: jax.Array, values_BNGC: jax.Array) -> LayerState:
        """With the slots' own keys and values of step k. Those of step 0 are in the context: step 1 overwrites them."""
        if not len(self.keys_JBGNC):
            return self
        keys, values = (
            jax.lax.dynamic_update_index_in_dim(own, _swap_heads(new).astype(own.dtype), jnp.maximum(k - 1, 0), 0)
            for own, new in ((self.keys_JBGNC, keys_BNGC), (self.values_JBGNC, values_BNGC))
        )
        return self._replace(keys_JBGNC=keys, values_JBGNC=values)


def unroll(
    graphdef: Any,
    state: Any,
    batch: Batch,
    aux_BTAH: Float[Array, "B T A H"],
    embedded_BTW: Float[Array, "B T W"],
    slots: Selected,
    counts_KBT: Bool[Array, "K B T"],
    *,
    cross_documents: bool = False,
    fixed_window: bool = False,
    remat: bool = False,
    chunk_mlp: bool = True,
    backend: Backend = "chunked",
) -> Predictions:
    """All K TTT steps of the draft -> what the objective needs.

    Step 0 computes keys and values at every position, since later slots attend to them; everything else is computed at
    the N live slots. Queries and keys rotate by position t + k, and gradients flow through all steps.

    Args:
      graphdef, state: of an `Eagle3`, as nnx.split gives them.
      embedded_BTW: each position's own embedding row, which is frozen.
      slots: the N slots of each row that count at some step, from `align.select`.
      counts_KBT: which slots count at which step, from `align.counting_slots`.
      cross_documents: as in `align.read_positions`.
      fixed_window: as in `objective.ObjectiveSpec`.
      remat: save only the residual stream and attention's output for the backward pass; other products are recomputed.
      chunk_mlp: with `remat`, compute MLPs by `chunked_mlp`; it needs whole kernels on each device.
      backend: of the attention to step-0 keys.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    draft = nnx.merge(graphdef, state)
    steps = counts_KBT.shape[0]
    reads_KBT = align.read_positions(batch.segments_BT, steps, cross_documents=cross_documents)
    reads_KBN = jax.vmap(lambda reads: take_rows(reads, slots.positions_BN))(reads_KBT)
    counts_KBN = jax.vmap(lambda counts: take_rows(counts, slots.positions_BN))(counts_KBT) & slots.live_BN
    positions_BN = take_rows(batch.positions_BT, slots.positions_BN)
    fused_BTW = draft.fuse(aux_BTAH)
    states = _empty_states(draft, steps - 1, slots.positions_BN.shape)
    if remat and chunk_mlp:
        states = tuple(s._replace(mlp=_mlp_kernels(layer)) for s, layer in zip(states, draft.layers, strict=True))
    contexts = _step_0(draft, batch, fused_BTW, _embedding_of(embedded_BTW, reads_KBT[0]), slots, backend)
    contexts = tuple(
        c._replace(window=0 if fixed_window else c.window, mlp=jax.lax.stop_gradient(s.mlp))
        for c, s in zip(contexts, states, strict=True)
    )
    saved = (ATTENTION, RESIDUAL_STREAM) if remat else (ATTENTION, RESIDUAL_STREAM, PRODUCT)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*saved))
    def step(carry, step_inputs):
        k, reads_BN = step_inputs
        embedded_BNW = _embedding_of(embedded_BTW, reads_BN)
        draft = nnx.merge(graphdef, state)
        return _step(draft, contexts, carry, k, embedded_BNW, positions_BN + k, slots.positions_BN, backend)

    carry = (take_rows(fused_BTW, slots.positions_BN), states)
    (hidden_BNW, states), before_KBNW = jax.lax.scan(step, carry, (jnp.arange(steps), reads_KBN))
    # Each step returned what lm_head reads of the hidden state that it started from, which is the step before's.
    last_BNW = draft.finish(ResidualStream.of(hidden_BNW, draft.dtype))[0].astype(draft.dtype)
    for_head_KBNW = jnp.concatenate([before_KBNW[1:], last_BNW[None]])
    for s in states:
        own = BackwardCarry(s.keys_JBGNC, s.values_JBGNC)
        for_head_KBNW = deliver_to_backward(for_head_KBNW, own, s.backward_carry)
    return Predictions(for_head_KBNW, reads_KBN, counts_KBN)


def _step_0(draft: Eagle3, batch: Batch, fused_BTW, embedded_BTW, slots: Selected, backend: Backend):
    """Step 0 at every position, as far as later slots attend to it: the last layer stops at its keys and values."""
    starts_BT = align.document_starts(batch.segments_BT)
    last_BT = jnp.broadcast_to(jnp.arange(starts_BT.shape[1]), starts_BT.shape)
    stream, contexts = ResidualStream.of(fused_BTW, draft.dtype), []
    for layer, window in zip(draft.layers, draft.spec.windows, strict=True):
        read, residual = layer.inputs(embedded_BTW, stream)
        keys, values = (_swap_heads(x) for x in layer.self_attn.keys_values(read, batch.positions_BT))
        first_BT = jnp.maximum(starts_BT, last_BT - window + 1) if window else starts_BT
        contexts.append(LayerContext(keys, values, take_rows(first_BT, slots.positions_BN), window, None))
        if len(contexts) == len(draft.layers):
            break
        queries = _swap_heads(layer.self_attn.queries(read, batch.positions_BT))
        no_own = _empty_states(draft, 0, first_BT.shape)[0].backward_carry
        mixed, _ = attend_ttt(
            *(queries, keys, values, first_BT, last_BT, *no_own, jnp.zeros(0, bool)),
            dtype=draft.dtype,
            backward_carry=None,
            backend=backend,
        )
        stream = ResidualStream.of(layer.finish(residual, _swap_heads(mixed)), draft.dtype)
    return tuple(contexts)


def _step(draft: Eagle3, contexts, carry, k: jax.Array, embedded_BNW, rotations_BN, last_BN, backend: Backend):
    """One TTT step -> (the last layer's output and the layers' states, what lm_head reads of the output before).

    The final norm is at the head of the next step, so that its input is saved once, with the first layer's input.

    Args:
      contexts, carry: each layer's `LayerContext`; (the output of the step before, each layer's `LayerState`).
      k: number of the step. embedded_BNW: embeddings of the tokens that the slots read.
      rotations_BN: positions that queries and keys rotate by. last_BN: the slots' own positions in the row.
    """
    hidden, states = carry
    stream = ResidualStream.of(hidden, draft.dtype)
    for_head, next_hidden = draft.finish(stream)
    if next_hidden is not hidden:  # the first step starts from fused aux hidden states, which are not normed
        stream = ResidualStream.of(jnp.where(k == 0, hidden, next_hidden), draft.dtype)
    new_states = []
    for layer, context, layer_state in zip(draft.layers, contexts, states, strict=True):
        read, residual = layer.inputs(embedded_BNW, stream)
        layer_state = layer_state.with_step(k, *layer.self_attn.keys_values(read, rotations_BN))
        own_keys, own_values, backward_carry, mlp = layer_state
        first_BN, own_allowed_J = context.visible(k, last_BN, len(own_keys))
        queries = _swap_heads(layer.self_attn.queries(read, rotations_BN))
        mixed, backward_carry = attend_ttt(
            *(queries, context.keys_BGTC, context.values_BGTC, first_BN, last_BN, own_keys, own_values, own_allowed_J),
            dtype=draft.dtype,
            backward_carry=backward_carry,
            backend=backend,
        )
        if context.mlp is None:
            hidden = layer.finish(residual, _swap_heads(mixed))
        else:
            x, normed = layer.attended(residual, _swap_heads(mixed))
            y, mlp = chunked_mlp(layer.dtype, normed, context.mlp, mlp)
            hidden = x + y
        stream = ResidualStream.of(hidden, draft.dtype)
        new_states.append(LayerState(own_keys, own_values, backward_carry, mlp))
    return (hidden, tuple(new_states)), for_head.astype(draft.dtype)


def _embedding_of(embedded_BTW: jax.Array, reads_BN: jax.Array) -> jax.Array:
    """Embeddings of the tokens at these positions; of any token where a slot reads none, since it does not count."""
    rows = take_rows(embedded_BTW, jnp.minimum(reads_BN, embedded_BTW.shape[1] - 1))
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _empty_states(draft: Eagle3, own_steps: int, slots: tuple[int, ...]) -> tuple[LayerState, ...]:
    """Each layer's state before the first step, for [B, N] slots that take `own_steps` further steps."""
    rows, count = slots
    empty = jnp.zeros((own_steps, rows, draft.spec.kv_heads, count, draft.spec.head_dim), draft.dtype)
    return tuple(LayerState(empty, empty, BackwardCarry(empty, empty)) for _ in draft.layers)


def _mlp_kernels(layer: Any) -> MLPKernels | None:
    """The kernels of a layer's MLP; None where a user's own class computes it in another way."""
    if type(layer).finish is not DraftLayer.finish or type(layer.mlp) is not DraftMLP:
        return None
    return MLPKernels(layer.mlp.gate_proj[...], layer.mlp.up_proj[...], layer.mlp.down_proj[...])


def _swap_heads(x: jax.Array) -> jax.Array:
    """[B, N, heads, C] to [B, heads, N, C], or back."""
    return jnp.swapaxes(x, 1, 2)
