"""Flash attention to the step-0 keys as Pallas kernels for TPUs.

Slots may stand at any rising positions and see keys from any first one, so the mask is made of two numbers a slot, and
blocks of keys that no slot of a block sees are skipped, neither fetched nor multiplied. The heads that share a key head
go through the matrix unit together, as rows of one product.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jeagle.drafts.ttt_attention.past import MASKED, Past

BLOCKS = (512, 256, 128)
ROWS = 1024  # of one product's scores: slots of a block times heads of a group


def divides(slots: int, length: int) -> bool:
    """Whether so many slots and positions divide into blocks."""
    return slots % BLOCKS[-1] == 0 and length % BLOCKS[-1] == 0


class Shape(NamedTuple):
    """Of one call: blocks of `slots` and of `keys`, R heads a group."""

    heads: int
    slots: int
    keys: int
    slot_blocks: int
    key_blocks: int


def _shape(past: Past) -> Shape:
    _, _, heads, slots, _ = past.queries_BGRNC.shape
    length = past.keys_BGTC.shape[2]
    block = next(b for b in BLOCKS if slots % b == 0 and (b * heads <= ROWS or b == BLOCKS[-1]))
    keys = next(b for b in BLOCKS if length % b == 0)
    return Shape(heads, block, keys, slots // block, length // keys)


def forward(past: Past, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Past` says."""
    shape, (batch, groups, heads, slots, width) = _shape(past), past.queries_BGRNC.shape
    queries, keys, values, numbers = _specs(shape, width)
    rows = shape.heads * shape.slots
    out = jax.ShapeDtypeStruct(past.queries_BGRNC.shape, jnp.float32)
    number = jax.ShapeDtypeStruct((batch, groups, heads, slots, 1), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, shape.slot_blocks, shape.key_blocks),
            in_specs=[queries, keys, values, _seen_spec(shape)],
            out_specs=[queries, numbers, numbers],
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (width, 1, 1)],
        ),
        out_shape=[out, number, number],
        compiler_params=_semantics(3),
        interpret=interpret,
    )
    return tuple(call(*_reach(past, shape), *_operands(past), _seen(past)))


def backward(
    past: Past, dout: jax.Array, lse: jax.Array, taken: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Past` says."""
    given = (*_operands(past), _seen(past), dout.astype(past.dtype), lse, taken)
    reach, shape = _reach(past, _shape(past)), _shape(past)
    return _dqueries(past, shape, interpret)(*reach, *given), *_dkeys_dvalues(past, shape, interpret)(*reach, *given)


def _dqueries(past: Past, shape: Shape, interpret: bool) -> Any:
    batch, groups, _, _, width = past.queries_BGRNC.shape
    queries, keys, values, numbers = _specs(shape, width)
    return pl.pallas_call(
        functools.partial(_dqueries_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, shape.slot_blocks, shape.key_blocks),
            in_specs=[queries, keys, values, _seen_spec(shape), queries, numbers, numbers],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((shape.heads * shape.slots, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(past.queries_BGRNC.shape, jnp.float32),
        compiler_params=_semantics(3),
        interpret=interpret,
    )


def _dkeys_dvalues(past: Past, shape: Shape, interpret: bool) -> Any:
    """The same with slots in the inner loop: a block of keys gathers from all slots."""
    batch, groups, length, width = past.keys_BGTC.shape
    queries = pl.BlockSpec((1, 1, shape.heads, shape.slots, width), lambda b, g, t, n, lo, hi: (b, g, 0, n, 0))
    numbers = pl.BlockSpec((1, 1, shape.heads, shape.slots, 1), lambda b, g, t, n, lo, hi: (b, g, 0, n, 0))
    keys = pl.BlockSpec((1, 1, shape.keys, width), lambda b, g, t, n, lo, hi: (b, g, t, 0))
    seen = pl.BlockSpec((1, shape.slots, 2), lambda b, g, t, n, lo, hi: (b, n, 0))
    out = jax.ShapeDtypeStruct((batch, groups, length, width), jnp.float32)
    return pl.pallas_call(
        functools.partial(_dkeys_dvalues_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, shape.key_blocks, shape.slot_blocks),
            in_specs=[queries, keys, keys, seen, queries, numbers, numbers],
            out_specs=[keys, keys],
            scratch_shapes=[pltpu.VMEM((shape.keys, width), jnp.float32) for _ in "kv"],
        ),
        out_shape=[out, out],
        compiler_params=_semantics(3),
        interpret=interpret,
    )


def _semantics(parallel: int) -> Any:
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * parallel + ("arbitrary",))


def _operands(past: Past) -> tuple[jax.Array, ...]:
    return tuple(x.astype(past.dtype) for x in (past.queries_BGRNC, past.keys_BGTC, past.values_BGTC))


def _seen(past: Past) -> jax.Array:
    """First and last key of each slot, [B, N, 2]."""
    return jnp.stack([past.first_BN, past.last_BN], axis=-1).astype(jnp.int32)


def _reach(past: Past, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The first and last block of keys that some slot of a block of slots sees: int32, [B * blocks of slots] each."""
    blocks = past.first_BN.shape[0] * shape.slot_blocks
    first = past.first_BN.reshape(blocks, shape.slots).min(axis=1)
    last = past.last_BN.reshape(blocks, shape.slots).max(axis=1)
    return (first // shape.keys).astype(jnp.int32), (last // shape.keys).astype(jnp.int32)


def _specs(shape: Shape, width: int) -> tuple[pl.BlockSpec, ...]:
    """Of queries, keys, values, and one number a query, keys in the inner loop.

    Out of reach, the nearest block of keys is named again, which takes no fetch.
    """

    def near(b, g, n, t, lo, hi):
        at = b * shape.slot_blocks + n
        return (b, g, jnp.clip(t, lo[at], hi[at]), 0)

    queries = pl.BlockSpec((1, 1, shape.heads, shape.slots, width), lambda b, g, n, t, lo, hi: (b, g, 0, n, 0))
    numbers = pl.BlockSpec((1, 1, shape.heads, shape.slots, 1), lambda b, g, n, t, lo, hi: (b, g, 0, n, 0))
    keys = pl.BlockSpec((1, 1, shape.keys, width), near)
    return queries, keys, keys, numbers


def _seen_spec(shape: Shape) -> pl.BlockSpec:
    return pl.BlockSpec((1, shape.slots, 2), lambda b, g, n, t, lo, hi: (b, n, 0))


def _in_reach(shape: Shape, n, t, lo_ref, hi_ref):
    at = pl.program_id(0) * shape.slot_blocks + n
    return (t >= lo_ref[at]) & (t <= hi_ref[at])


def _product(a, b, contracted: tuple[int, int]):
    """Over axis `contracted[0]` of a and `contracted[1]` of b, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def _rows(ref):
    """[1, 1, R, n, X] -> [R * n, X]."""
    block = ref[0, 0]
    return block.reshape(-1, block.shape[-1])


def _scores(shape: Shape, t, queries, keys, seen_ref):
    """[R * n, t], masked."""
    scores = _product(queries, keys, (1, 1))
    here = t * shape.keys + jax.lax.broadcasted_iota(jnp.int32, (shape.slots, shape.keys), 1)
    first, last = seen_ref[0, :, :1], seen_ref[0, :, 1:]
    hidden = jnp.where((here >= first) & (here <= last), 0.0, MASKED)
    masked = scores.reshape(shape.heads, shape.slots, shape.keys) + hidden[None]
    return masked.reshape(scores.shape)


def _forward_kernel(shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, seen_ref, out_ref, top_ref, total_ref, acc, top, total):
    n, t = pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when(_in_reach(shape, n, t, lo_ref, hi_ref))
    def _():
        scores = _scores(shape, t, _rows(q_ref), k_ref[0, 0], seen_ref)
        # A row that sees nothing of its first blocks gathers what the first key that it sees scales down to zero.
        new = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - new), jnp.exp(top[...] - new)
        total[...] = total[...] * fade + weights.sum(axis=1, keepdims=True)
        acc[...] = acc[...] * fade + _product(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))
        top[...] = new

    @pl.when(t == shape.key_blocks - 1)
    def _():
        for ref, found in ((out_ref, acc), (top_ref, top), (total_ref, total)):
            ref[0, 0] = found[...].reshape(ref.shape[2:])


def _weights_and_dscores(shape, t, q_ref, k_ref, v_ref, seen_ref, dout_ref, lse_ref, taken_ref):
    weights = jnp.exp(_scores(shape, t, _rows(q_ref), k_ref[0, 0], seen_ref) - _rows(lse_ref))
    dweights = _product(_rows(dout_ref), v_ref[0, 0], (1, 1))
    dscores = weights * (dweights - _rows(taken_ref))
    return weights.astype(v_ref.dtype), dscores.astype(q_ref.dtype)


def _dqueries_kernel(shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, seen_ref, dout_ref, lse_ref, taken_ref, dq_ref, acc):
    n, t = pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(_in_reach(shape, n, t, lo_ref, hi_ref))
    def _():
        given = (q_ref, k_ref, v_ref, seen_ref, dout_ref, lse_ref, taken_ref)
        _, dscores = _weights_and_dscores(shape, t, *given)
        acc[...] += _product(dscores, k_ref[0, 0], (1, 0))

    @pl.when(t == shape.key_blocks - 1)
    def _():
        dq_ref[0, 0] = acc[...].reshape(dq_ref.shape[2:])


def _dkeys_dvalues_kernel(
    shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, seen_ref, dout_ref, lse_ref, taken_ref, dk_ref, dv_ref, dk_acc, dv_acc
):
    t, n = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(_in_reach(shape, n, t, lo_ref, hi_ref))
    def _():
        given = (q_ref, k_ref, v_ref, seen_ref, dout_ref, lse_ref, taken_ref)
        weights, dscores = _weights_and_dscores(shape, t, *given)
        dk_acc[...] += _product(dscores, _rows(q_ref), (0, 0))
        dv_acc[...] += _product(weights, _rows(dout_ref), (0, 0))

    @pl.when(n == shape.slot_blocks - 1)
    def _():
        dk_ref[0, 0] = dk_acc[...]
        dv_ref[0, 0] = dv_acc[...]
