"""Flash attention to the step-0 keys as Pallas kernels for TPUs.

Slots may have any rising positions and attend to keys from any first one, so two numbers per slot make the mask. Blocks
of keys that no slot of a block attends to are skipped: neither fetched nor multiplied. The heads that share a key head
go through the matrix unit together, as rows of one product.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jeagle.drafts.ttt_attention.reference import MASKED, Step0Inputs, contract

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
    by_query = inputs.queries_BGRNC.shape
    number = (*by_query[:-1], 1)
    mixed, top, total = _call(_forward_kernel, inputs, (), (by_query, number, number), interpret=interpret)
    return mixed, top, total


def backward(
    inputs: Step0Inputs, dout: jax.Array, lse: jax.Array, dout_dot_out: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""
    given, by_key = (dout.astype(inputs.dtype), lse, dout_dot_out), inputs.keys_BGTC.shape
    (dqueries,) = _call(_dqueries_kernel, inputs, given, (inputs.queries_BGRNC.shape,), interpret=interpret)
    dkeys, dvalues = _call(
        _dkeys_dvalues_kernel, inputs, given, (by_key, by_key), slots_inside=True, interpret=interpret
    )
    return dqueries, dkeys, dvalues


def _call(
    kernel: Callable,
    inputs: Step0Inputs,
    given: tuple[jax.Array, ...],
    outputs: tuple[tuple[int, ...], ...],
    *,
    slots_inside: bool = False,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel on the inputs and on `given`; it sums each of the float32 `outputs` in scratch memory.

    The inner loop, over which it sums, is that of the blocks of keys, or of the blocks of slots with `slots_inside`.
    """
    shape = _shape(inputs)
    arrays = [x.astype(inputs.dtype) for x in (inputs.queries_BGRNC, inputs.keys_BGTC, inputs.values_BGTC)]
    arrays += [jnp.stack([inputs.first_BN, inputs.last_BN], axis=-1).astype(jnp.int32), *given]
    # The first and the last block of keys that a block of slots attends to: int32 [B * blocks of slots] each.
    first = inputs.first_BN.reshape(-1, shape.slots).min(axis=1) // shape.keys
    last = inputs.last_BN.reshape(-1, shape.slots).max(axis=1) // shape.keys
    loops = (shape.key_blocks, shape.slot_blocks) if slots_inside else (shape.slot_blocks, shape.key_blocks)
    rows = shape.keys if slots_inside else shape.heads * shape.slots
    call = pl.pallas_call(
        functools.partial(kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*inputs.keys_BGTC.shape[:2], *loops),
            in_specs=[_spec(shape, x.shape, slots_inside) for x in arrays],
            out_specs=[_spec(shape, size, slots_inside) for size in outputs],
            scratch_shapes=[pltpu.VMEM((rows, size[-1]), jnp.float32) for size in outputs],
        ),
        out_shape=[jax.ShapeDtypeStruct(size, jnp.float32) for size in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
    )
    return tuple(call(first.astype(jnp.int32), last.astype(jnp.int32), *arrays))


def _spec(shape: TPUKernelShape, size: tuple[int, ...], slots_inside: bool) -> pl.BlockSpec:
    """The block of an array [B, N, 2], of keys [B, G, T, C] or of queries [B, G, R, N, C] that a program takes.

    With keys in the inner loop, where no slot attends to a block of keys, the nearest one that is needed stands for it,
    which takes no fetch.
    """

    def at(b, g, outer, inner, lo, hi):
        n, t = (inner, outer) if slots_inside else (outer, inner)
        if len(size) == 4:
            here = b * shape.slot_blocks + n
            return b, g, t if slots_inside else jnp.clip(t, lo[here], hi[here]), 0
        return (b, n, 0) if len(size) == 3 else (b, g, 0, n, 0)

    blocks = {3: (1, shape.slots), 4: (1, 1, shape.keys), 5: (1, 1, shape.heads, shape.slots)}
    return pl.BlockSpec((*blocks[len(size)], size[-1]), at)


def _in_reach(shape: TPUKernelShape, n, t, lo_ref, hi_ref):
    at = pl.program_id(0) * shape.slot_blocks + n
    return (t >= lo_ref[at]) & (t <= hi_ref[at])


def _rows(ref):
    """[1, 1, R, n, X] -> [R * n, X]."""
    block = ref[0, 0]
    return block.reshape(-1, block.shape[-1])


def _scores(shape: TPUKernelShape, t, queries, keys, visible_ref):
    """[R * n, t], masked."""
    scores = contract(queries, keys, (1, 1))
    here = t * shape.keys + jax.lax.broadcasted_iota(jnp.int32, (shape.slots, shape.keys), 1)
    first, last = visible_ref[0, :, :1], visible_ref[0, :, 1:]
    hidden = jnp.where((here >= first) & (here <= last), 0.0, MASKED)
    masked = scores.reshape(shape.heads, shape.slots, shape.keys) + hidden[None]
    return masked.reshape(scores.shape)


def _sum_blocks(block, blocks: int, wanted, add: Callable[[], None], *sums):
    """Runs `add` on a wanted block; each of the sums (result, scratch, start) starts at the first block."""

    @pl.when(block == 0)
    def _():
        for _, scratch, start in sums:
            scratch[...] = jnp.full_like(scratch, start)

    pl.when(wanted)(add)

    @pl.when(block == blocks - 1)
    def _():
        for ref, scratch, _ in sums:
            ref[0, 0] = scratch[...].reshape(ref.shape[2:])


def _forward_kernel(
    shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, visible_ref, out_ref, top_ref, total_ref, acc, top, total
):
    n, t = pl.program_id(2), pl.program_id(3)

    def add():
        scores = _scores(shape, t, _rows(q_ref), k_ref[0, 0], visible_ref)
        # What a row sums over blocks that are masked for it, its first unmasked key scales down to zero.
        new = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - new), jnp.exp(top[...] - new)
        total[...] = total[...] * fade + weights.sum(axis=1, keepdims=True)
        acc[...] = acc[...] * fade + contract(weights.astype(v_ref.dtype), v_ref[0, 0], (1, 0))
        top[...] = new

    sums = (out_ref, acc, 0.0), (top_ref, top, MASKED), (total_ref, total, 0.0)
    _sum_blocks(t, shape.key_blocks, _in_reach(shape, n, t, lo_ref, hi_ref), add, *sums)


def _weights_and_dscores(shape, t, q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dot_ref):
    weights = jnp.exp(_scores(shape, t, _rows(q_ref), k_ref[0, 0], visible_ref) - _rows(lse_ref))
    dweights = contract(_rows(dout_ref), v_ref[0, 0], (1, 1))
    dscores = weights * (dweights - _rows(dot_ref))
    return weights.astype(v_ref.dtype), dscores.astype(q_ref.dtype)


def _dqueries_kernel(shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dot_ref, dq_ref, acc):
    n, t = pl.program_id(2), pl.program_id(3)

    def add():
        _, dscores = _weights_and_dscores(shape, t, q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dot_ref)
        acc[...] += contract(dscores, k_ref[0, 0], (1, 0))

    _sum_blocks(t, shape.key_blocks, _in_reach(shape, n, t, lo_ref, hi_ref), add, (dq_ref, acc, 0.0))


def _dkeys_dvalues_kernel(
    shape, lo_ref, hi_ref, q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dot_ref, dk_ref, dv_ref, dk_acc, dv_acc
):
    t, n = pl.program_id(2), pl.program_id(3)

    def add():
        given = (q_ref, k_ref, v_ref, visible_ref, dout_ref, lse_ref, dot_ref)
        weights, dscores = _weights_and_dscores(shape, t, *given)
        dk_acc[...] += contract(dscores, _rows(q_ref), (0, 0))
        dv_acc[...] += contract(weights, _rows(dout_ref), (0, 0))

    sums = (dk_ref, dk_acc, 0.0), (dv_ref, dv_acc, 0.0)
    _sum_blocks(n, shape.slot_blocks, _in_reach(shape, n, t, lo_ref, hi_ref), add, *sums)
