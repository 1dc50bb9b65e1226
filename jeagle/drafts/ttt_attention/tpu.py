"""Flash attention to the step-0 keys as Pallas kernels for TPUs.

Slots may have any rising positions and attend to keys from any first one, so two numbers per slot make the mask. Blocks
of keys that no slot of a block attends to are skipped: neither fetched nor multiplied. The heads that share a key head
go through the matrix unit together, as rows of one product.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jeagle.drafts.ttt_attention.reference import MASKED, Step0Inputs

BLOCKS = (512, 256, 128)
ROWS = 1024  # most rows of one product: slots of a block times heads of a group


def divides(slots: int, length: int) -> bool:
    """Whether so many slots and positions divide into blocks."""
    return slots % BLOCKS[-1] == 0 and length % BLOCKS[-1] == 0


class TPUKernelShape(NamedTuple):
    """The sizes of a call: R `heads` in a group, `slots` and `keys` in a block, and how many blocks of each."""

    heads: int
    slots: int
    keys: int
    slot_blocks: int
    key_blocks: int


def _shape(inputs: Step0Inputs) -> TPUKernelShape:
    _, _, heads, slots, _ = inputs.queries_BGRNC.shape
    length = inputs.keys_BGTC.shape[2]
    block = next(b for b in BLOCKS if slots % b == 0 and (b * heads <= ROWS or b == BLOCKS[-1]))
    keys = next(b for b in BLOCKS if length % b == 0)
    return TPUKernelShape(heads, block, keys, slots // block, length // keys)


def forward(inputs: Step0Inputs, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""
    shape, (batch, groups, heads, slots, width) = _shape(inputs), inputs.queries_BGRNC.shape
    queries, keys, values, numbers = _specs(shape, width)
    rows = shape.heads * shape.slots
    out = jax.ShapeDtypeStruct(inputs.queries_BGRNC.shape, jnp.float32)
    number = jax.ShapeDtypeStruct((batch, groups, heads, slots, 1), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, shape.slot_blocks, shape.key_blocks),
            in_specs=[queries, keys, values, _visible_spec(shape)],
            out_specs=[queries, numbers, numbers],
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (width, 1, 1)],
        ),
        out_shape=[out, number, number],
        compiler_params=_semantics(3),
        interpret=interpret,
    )
    return tuple(call(*_reach(inputs, shape), *_operands(inputs), _visible(inputs)))


def backward(
    inputs: Step0Inputs, dout: jax.Array, lse: jax.Array, dout_dot_out: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""
    given = (*_operands(inputs), _visible(inputs), dout.astype(inputs.dtype), lse, dout_dot_out)
    reach, shape = _reach(inputs, _shape(inputs)), _shape(inputs)
    return _dqueries(inputs, shape, interpret)(*reach, *given), *_dkeys_dvalues(inputs, shape, interpret)(
        *reach, *given
    )


def _dqueries(inputs: Step0Inputs, shape: TPUKernelShape, interpret: bool) -> Any:
    batch, groups, _, _, width = inputs.queries_BGRNC.shape
    queries, keys, values, numbers = _specs(shape, width)
    return pl.pallas_call(
        functools.partial(_dqueries_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, shape.slot_blocks, shape.key_blocks),
            in_specs=[queries, keys, values, _visible_spec(shape), queries, numbers, numbers],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((shape.heads * shape.slots, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(inputs.queries_BGRNC.shape, jnp.float32),
        compiler_params=_semantics(3),
        interpret=interpret,
    )


def _dkeys_dvalues(inputs: Step0Inputs, shape: TPUKernelShape, interpret: bool) -> Any:
    """The gradients of keys and values, with slots in the inner loop: a block of keys sums over all slots."""
    batch, groups, length, width = inputs.keys_BGTC.shape
    queries = pl.BlockSpec((1, 1, shape.heads, shape.slots, width), lambda b, g, t, n, lo, hi: (b, g, 0, n, 0))
    numbers = pl.BlockSpec((1, 1, shape.heads, shape.slots, 1), lambda b, g, t, n, lo, hi: (b, g, 0, n, 0))
    keys = pl.BlockSpec((1, 1, shape.keys, width), lambda b, g, t, n, lo, hi: (b, g, t, 0))
    visible = pl.BlockSpec((1, shape.slots, 2), lambda b, g, t, n, lo, hi: (b, n, 0))
    out = jax.ShapeDtypeStruct((batch, groups, length, width), jnp.float32)
    return pl.pallas_call(
        functools.partial(_dkeys_dvalues_kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, groups, shape.key_blocks, shape.slot_blocks),
            in_specs=[queries, keys, keys, visible, queries, numbers, numbers],
            out_specs=[keys, keys],
            scratch_shapes=[pltpu.VMEM((shape.keys, width), jnp.float32) for _ in "kv"],
        ),
        out_shape=[out, out],
        compiler_params=_semantics(3),
        interpret=interpret,
    )


def _semantics(parallel: int) -> Any:
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * parallel + ("arbitrary",))


def _operands(inputs: Step0Inputs) -> tuple[jax.Array, ...]:
    return tuple(x.astype(inputs.dtype) for x in (inputs.queries_BGRNC, inputs.keys_BGTC, inputs.values_BGTC))


def _visible(inputs: Step0Inputs) -> jax.Array:
    """The first and the last position of each slot's keys, int32 [B, N, 2]."""
    return jnp.stack([inputs.first_BN, inputs.last_BN], axis=-1).astype(jnp.int32)


def _reach(inputs: Step0Inputs, shape: TPUKernelShape) -> tuple[jax.Array, jax.Array]:
    """The first and the last block of keys that a block of slots attends to: int32 [B * blocks of slots] each."""
    blocks = inputs.first_BN.shape[0] * shape.slot_blocks
    first = inputs.first_BN.reshape(blocks, shape.slots).min(axis=1)
    last = inputs.last_BN.reshape(blocks, shape.slots).max(axis=1)
    return (first // shape.keys).astype(jnp.int32), (last // shape.keys).astype(jnp.int32)


def _specs(shape: TPUKernelShape, width: int) -> tuple[pl.BlockSpec, ...]:
    """Block specs of queries, keys, values, and one number per query, with keys in the inner loop.

    Where no slot attends to a block of keys, the nearest one that is needed stands for it, which takes no fetch.
    """

    def needed(b, g, n, t, lo, hi):
        at = b * shape.slot_blocks + n
        return (b, g, jnp.clip(t, lo[at], hi[at]), 0)

    queries = pl.BlockSpec((1, 1, shape.heads, shape.slots, width), lambda b, g, n, t, lo, hi: (b, g, 0, n, 0))
    numbers = pl.BlockSpec((1, 1, shape.heads, shape.slots, 1), lambda b, g, n, t, lo, hi: (b, g, 0, n, 0))
    keys = pl.BlockSpec((1, 1, shape.keys, width), needed)
    return queries, keys, keys, numbers


def _visible_spec(shape: TPUKernelShape) -> pl.BlockSpec:
    return pl.BlockSpec((1, shape.slots, 2), lambda b, g, n, t, lo, hi: (b, n, 0))


def _in_reach(shape: TPUKernelShape, n, t, lo_ref, hi_ref):
    at = pl.program_id(0) * shape.slot_blocks + n
    return (t >= lo_ref[at]) & (t <= hi_ref[at])


def _product(a, b, contracted: tuple[int, int]):
    """Contracts axis `contracted[0]` of a with `contracted[1]` of b, summed in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def _rows(ref):
    """[1, 1, R, n, X] -> [R * n, X]."""
    block = ref[0, 0]
    return block.reshape(-1, block.shape[-1])


def _scores(shape: TPUKernelShape, t, queries, keys, visible_ref):
    """[R * n, t], masked."""
    scores = _product(queries, keys, (1, 1))
    here = t * shape.keys + jax.lax.broadcasted_iota(jnp.int32, (shape.slots, shape.keys), 1)
    first, last = visible_ref[0, :, :1], visible_ref[0, :, 1:]
    hidden = jnp.where((here >= first) & (here <= last), 0.0, MASKED)
    masked = scores.reshape(shape.heads, shape.slots, shape.keys) + hidden[None]
    return masked.reshape(scores.shape)


def _forward_kernel(
    shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, visible_ref, out_ref, top_ref, total_ref, acc, top, total
):
    n, t = pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when(_in_reach(shape, n, t, lo_ref, hi_ref))
    def _():
        scores = _scores(shape, t, _rows(q_ref), k_ref[0, 0], visible_ref)
        # What a row sums over blocks that are masked for it, its first unmasked key scales down to zero.
        new = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - new), jnp.exp(top[...] - new)
        total[...] = total[...] * fade + weights.sum(axis=1, keepdims=True)
        acc[...] = acc[...] * fade + _product(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))
        top[...] = new

    @pl.when(t == shape.key_blocks - 1)
    def _():
        for ref, scratch in ((out_ref, acc), (top_ref, top), (total_ref, total)):
            ref[0, 0] = scratch[...].reshape(ref.shape[2:])


def _weights_and_dscores(shape, t, q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dout_dot_out_ref):
    weights = jnp.exp(_scores(shape, t, _rows(q_ref), k_ref[0, 0], visible_ref) - _rows(lse_ref))
    dweights = _product(_rows(dout_ref), v_ref[0, 0], (1, 1))
    dscores = weights * (dweights - _rows(dout_dot_out_ref))
    return weights.astype(v_ref.dtype), dscores.astype(q_ref.dtype)


def _dqueries_kernel(
    shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dout_dot_out_ref, dq_ref, acc
):
    n, t = pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(_in_reach(shape, n, t, lo_ref, hi_ref))
    def _():
        given = (q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dout_dot_out_ref)
        _, dscores = _weights_and_dscores(shape, t, *given)
        acc[...] += _product(dscores, k_ref[0, 0], (1, 0))

    @pl.when(t == shape.key_blocks - 1)
    def _():
        dq_ref[0, 0] = acc[...].reshape(dq_ref.shape[2:])


def _dkeys_dvalues_kernel(
    shape,
    lo_ref,
    hi_ref,
    q_ref,
    k_ref,
    v_ref,
    visible_ref,
    dout_ref,
    lse_ref,
    dout_dot_out_ref,
    dk_ref,
    dv_ref,
    dk_acc,
    dv_acc,
):
    t, n = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(_in_reach(shape, n, t, lo_ref, hi_ref))
    def _():
        given = (q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dout_dot_out_ref)
        weights, dscores = _weights_and_dscores(shape, t, *given)
        dk_acc[...] += _product(dscores, _rows(q_ref), (0, 0))
        dv_acc[...] += _product(weights, _rows(dout_ref), (0, 0))

    @pl.when(n == shape.slot_blocks - 1)
    def _():
        dk_ref[0, 0] = dk_acc[...]
        dv_ref[0, 0] = dv_acc[...]
