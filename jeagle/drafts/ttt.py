"""Training-time test: K steps in which a draft reads its own states, at the live slots only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle import align
from jeagle.align import Selected, take_rows
from jeagle.drafts import ttt_attention
from jeagle.drafts.chunked_mlp import Kernels, lean_mlp
from jeagle.drafts.eagle3 import Eagle3, Layer, Read, Stream
from jeagle.drafts.remat import ATTENTION, PRODUCT, STATE
from jeagle.interfaces import Batch, Predictions
from jeagle.layers import GatedMLP


class Past(NamedTuple):
    """Keys and values of step 0 at every position, of one layer."""

    keys_BGTC: jax.Array
    values_BGTC: jax.Array


class Own(NamedTuple):
    """What a layer hands from step to step.

    Attributes:
      keys_JBGNC, values_JBGNC: the slots' own keys and values of steps 1..K-1.
      mirror: what brings them along on the way back.
      kernels: of a lean MLP, on the way back their gradient; None for another.
    """

    keys_JBGNC: jax.Array
    values_JBGNC: jax.Array
    mirror: ttt_attention.Mirror
    kernels: Kernels | None = None


class Context(NamedTuple):
    """Of every layer, the step-0 keys and values; and the first and last of them that a slot sees."""

    past: tuple[Past, ...]
    first_BN: jax.Array
    last_BN: jax.Array
    window: int  # that moves on with k; 0: none does

    def seen(self, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first and the last step-0 key that slots see at step k."""
        if not self.window:
            return self.first_BN, self.last_BN
        return jnp.maximum(self.first_BN, self.last_BN + k - self.window + 1), self.last_BN

    def own(self, k: jax.Array, steps: int) -> jax.Array:
        """[J]: which of the slots' own keys, of steps 1 to J, they see at step k."""
        step_J = jnp.arange(1, steps + 1)
        return (step_J <= k) & (step_J > k - self.window) if self.window else step_J <= k


def unroll(
    graphdef: Any,
    state: Any,
    batch: Batch,
    aux_BTAH: jax.Array,
    embedded_BTW: jax.Array,
    slots: Selected,
    counts_KBT: jax.Array,
    *,
    cross_documents: bool = False,
    fixed_window: bool = False,
    remat: bool = False,
    lean: bool = True,
    backend: ttt_attention.Backend = "chunked",
) -> Predictions:
    """All K steps of TTT -> what the objective needs.

    Step 0 makes keys and values at every position, since later slots attend to them; everything else is made at the N
    live slots. Positions rotate by t + k, keys are kept rotated, and gradients flow through all steps.

    Args:
      graphdef, state: of an `Eagle3`.
      embedded_BTW: each position's own embedding row, frozen.
      slots: the N slots of each row that count at some step, from `align.select`.
      counts_KBT: from `align.counting_slots`.
      cross_documents: as in `align.read_positions`.
      fixed_window: as in `objective.ObjectiveSpec`.
      remat: keep the residual stream and attention alone for the backward pass, and make other products anew there.
      lean: of `remat`: MLPs are worked through in pieces of their inner width (see `lean_mlp`), which one device holds.
      backend: of the attention to step-0 keys.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    draft = nnx.merge(graphdef, state)
    steps = counts_KBT.shape[0]
    reads_KBT = align.read_positions(batch.segments_BT, steps, cross_documents=cross_documents)
    reads_KBN = jax.vmap(lambda reads: take_rows(reads, slots.positions_BN))(reads_KBT)
    counts_KBN = jax.vmap(lambda counts: take_rows(counts, slots.positions_BN))(counts_KBT) & slots.live_BN
    fused_BTW = draft.fuse(aux_BTAH)
    context = _context(draft, batch, fused_BTW, _embedded(embedded_BTW, reads_KBT[0]), slots, backend)
    if not fixed_window:
        context = context._replace(window=draft.spec.sliding_window)
    positions_BN = take_rows(batch.positions_BT, slots.positions_BN)

    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION, STATE, *(() if remat else (PRODUCT,)))

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def step(carry, parts):
        k, reads_BN = parts
        return _step(
            nnx.merge(graphdef, state),
            carry,
            k,
            _embedded(embedded_BTW, reads_BN),
            positions_BN,
            context,
            kernels,
            backend,
        )

    own = _empty_own(draft, steps, slots.positions_BN.shape)
    if remat and lean:
        own = tuple(o._replace(kernels=_lean(layer)) for o, layer in zip(own, draft.layers, strict=True))
    kernels = jax.lax.stop_gradient([o.kernels for o in own])
    carry = (take_rows(fused_BTW, slots.positions_BN), own)
    (hidden, own), before_KBNW = jax.lax.scan(step, carry, (jnp.arange(steps), reads_KBN))
    # Each step told what lm_head reads of the state that it was given: the one before's.
    last_BNW = draft.finish(Stream.of(hidden, draft.dtype))[0].astype(draft.dtype)
    hidden_KBNW = jnp.concatenate([before_KBNW[1:], last_BNW[None]])
    for mine in own:
        found = ttt_attention.Mirror(mine.keys_JBGNC, mine.values_JBGNC)
        hidden_KBNW = ttt_attention.reflect(hidden_KBNW, found, mine.mirror)
    return Predictions(hidden_KBNW, reads_KBN, counts_KBN)


def _embedded(embedded_BTW: jax.Array, reads_BN: jax.Array) -> jax.Array:
    """Embeddings of the tokens at these positions; any where a slot reads none (position T), for it does not count."""
    rows = take_rows(embedded_BTW, jnp.minimum(reads_BN, embedded_BTW.shape[1] - 1))
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _first_seen(batch: Batch, window: int) -> jax.Array:
    """The first position whose step-0 key each position sees: its document's, or its window's."""
    here_T = jnp.arange(batch.tokens_BT.shape[1])
    begins_BT = jnp.diff(batch.segments_BT, axis=1, prepend=-1) != 0
    first_BT = jax.lax.cummax(jnp.where(begins_BT, here_T, 0), axis=1)
    return jnp.maximum(first_BT, here_T - window + 1) if window else first_BT


def _context(draft: Eagle3, batch: Batch, fused_BTW, embedded_BTW, slots: Selected, backend: Any) -> Context:
    """Step 0 at every position, as far as later slots attend to it: the deepest layer stops at its keys and values."""
    first_BT = _first_seen(batch, draft.spec.sliding_window)
    last_BT = jnp.broadcast_to(jnp.arange(first_BT.shape[1]), first_BT.shape)
    hidden, past = fused_BTW, []
    for layer in draft.layers:
        read, residual = layer.inputs(embedded_BTW, Stream.of(hidden, draft.dtype))
        past.append(Past(*(_heads_first(x) for x in layer.self_attn.keys_values(read, batch.positions_BT))))
        if layer is draft.layers[-1]:
            break
        queries = _heads_first(layer.self_attn.queries(read, batch.positions_BT))
        nothing = _empty_own(draft, 1, first_BT.shape)[0].mirror
        mixed, _ = ttt_attention.attend(
            queries,
            *past[-1],
            first_BT,
            last_BT,
            *nothing,
            jnp.zeros(0, bool),
            dtype=draft.dtype,
            mirror=None,
            backend=backend,
        )
        hidden = layer.finish(residual, _heads_first(mixed))
    return Context(tuple(past), take_rows(first_BT, slots.positions_BN), slots.positions_BN, window=0)


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, N, heads, C] to [B, heads, N, C], or back."""
    return jnp.swapaxes(x, 1, 2)


def _empty_own(draft: Eagle3, steps: int, slots: tuple[int, int]) -> tuple[Own, ...]:
    """Room for the slots' own keys and values of steps 1..K-1, of every layer."""
    rows, count = slots
    shape = (steps - 1, rows, draft.spec.kv_heads, count, draft.spec.head_dim)
    empty = jnp.zeros(shape, draft.dtype)
    return tuple(Own(empty, empty, ttt_attention.Mirror(empty, empty)) for _ in draft.layers)


def _step(draft: Eagle3, carry, k: jax.Array, embedded, positions_BN, context: Context, kernels, backend: Any):
    """-> (the last layer's output and what layers pass on, what lm_head reads of the step before's output).

    The final norm stands at the head of the next step, so that what it reads is kept once, with what the layer reads.
    """
    hidden, own = carry
    stream = Stream.of(hidden, draft.dtype)
    for_head, state = draft.finish(stream)
    if state is not hidden:
        stream = Stream.of(jnp.where(k == 0, hidden, state), draft.dtype)
    seen, own_J = context.seen(k), context.own(k, own[0].keys_JBGNC.shape[0])
    new_own = []
    for layer, past, mine, frozen in zip(draft.layers, context.past, own, kernels, strict=True):
        read, residual = layer.inputs(embedded, stream)
        mine = _with_own(layer, mine, read, positions_BN + k, k)
        queries = _heads_first(layer.self_attn.queries(read, positions_BN + k))
        mixed, mirror = ttt_attention.attend(
            queries,
            *past,
            *seen,
            mine.keys_JBGNC,
            mine.values_JBGNC,
            own_J,
            dtype=draft.dtype,
            backend=backend,
            mirror=mine.mirror,
        )
        assert mirror is not None  # as it was given
        hidden, passed = _finished(layer, residual, _heads_first(mixed), frozen, mine.kernels)
        stream = Stream.of(hidden, draft.dtype)
        new_own.append(Own(mine.keys_JBGNC, mine.values_JBGNC, mirror, passed))
    return (hidden, tuple(new_own)), for_head.astype(draft.dtype)


def _lean(layer: Any) -> Kernels | None:
    """The kernels of a layer's MLP; None where it is of a user's own making."""
    own = type(layer).finish is not Layer.finish or type(layer.mlp) is not GatedMLP
    return None if own else Kernels.of(layer.mlp)


def _finished(layer, residual, mixed, kernels: Kernels | None, passed: Kernels | None):
    """The layer's output; and what it passes on to the next step where its MLP is a lean one."""
    if kernels is None:
        return layer.finish(residual, mixed), None
    x, normed = layer.attended(residual, mixed)
    y, passed = lean_mlp(layer.dtype, normed, kernels, passed)
    return x + y, passed


def _with_own(layer, mine: Own, read: Read, positions: jax.Array, k: jax.Array) -> Own:
    """Puts step k's own keys and values at place k - 1; step 0's lie in the context already."""
    if mine.keys_JBGNC.shape[0] == 0:
        return mine
    fresh = layer.self_attn.keys_values(read, positions)
    place = jnp.maximum(k - 1, 0)  # step 0 writes where step 1 will write again
    keys, values = (
        jax.lax.dynamic_update_index_in_dim(room, _heads_first(new).astype(room.dtype), place, 0)
        for room, new in zip((mine.keys_JBGNC, mine.values_JBGNC), fresh, strict=True)
    )
    return mine._replace(keys_JBGNC=keys, values_JBGNC=values)
