"""Flash attention to the step-0 keys as Pallas kernels for GPUs, lowered by Triton.

A program takes a block of slots of one head through the keys that they attend to, or a block of keys of one key head
through the slots that attend to them. It starts and ends at the blocks that it needs, so that neither later positions
nor other documents cost anything. Sums stay in registers, without atomic additions: every run gives the same results.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jeagle.drafts.ttt_attention.reference import MASKED, Step0Inputs, contract

SMALLEST = 16  # rows of a matrix product
LOG2_E = math.log2(math.e)  # the exponential that a GPU has is that of two


class Blocks(NamedTuple):
    """How many slots and keys a kernel's program takes at once, and Triton's warps and pipeline stages."""

    slots: int
    keys: int
    warps: int
    stages: int


# The keys are head widths up to which the blocks hold, in bfloat16: an H100 then computes all products by wgmma and
# spills no register. Products of float32 take more registers, so that their width counts four times.
FORWARD = {64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 4, 2), 512: Blocks(32, 32, 8, 1)}
DQUERIES = {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 4, 2), 512: Blocks(32, 16, 4, 1)}
DKEYS = {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 64, 8, 2), 512: Blocks(16, 32, 4, 1)}
LARGEST = Blocks(16, 16, 8, 1)


def divides(slots: int, length: int) -> bool:
    """Whether so many slots and positions divide into blocks."""
    return slots % SMALLEST == 0 and length % SMALLEST == 0


def forward(inputs: Step0Inputs, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""
    mixed, top, total = _call_by_slots(_forward_kernel, inputs, FORWARD, _arguments(inputs), 3, interpret)
    by_head = inputs.queries_BGRNC.shape
    return mixed[..., : by_head[-1]].reshape(by_head), *(x.reshape(*by_head[:-1], 1) for x in (top, total))


def backward(
    inputs: Step0Inputs, dout: jax.Array, lse: jax.Array, dout_dot_out: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""
    args, by_head = _arguments(inputs), inputs.queries_BGRNC.shape
    numbers = args[0].shape[:3]
    args += (_rows(dout.astype(inputs.dtype)), lse.reshape(numbers) * LOG2_E, dout_dot_out.reshape(numbers))
    (dqueries,) = _call_by_slots(_dqueries_kernel, inputs, DQUERIES, args, 1, interpret)
    dqueries = dqueries[..., : by_head[-1]].reshape(by_head)
    dkeys, dvalues = _dkeys_dvalues(inputs, args, interpret)
    return dqueries, dkeys[..., : by_head[-1]], dvalues[..., : by_head[-1]]


def _call_by_slots(
    kernel: Callable,
    inputs: Step0Inputs,
    table: dict[int, Blocks],
    args: tuple[jax.Array, ...],
    outputs: int,
    interpret: bool,
) -> Any:
    """Runs a kernel of programs (block of slots, head, batch) -> rows, and two numbers a row where `outputs` is 3.

    A block is not loaded as a whole: a kernel loads what it reads of it.
    """
    shape = _shape(inputs, table)
    block, blocks, heads = shape.blocks.slots, shape.slots // shape.blocks.slots, shape.heads

    def row(n: jax.Array, h: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        return b, jax.lax.div(h, jnp.int32(heads)), jax.lax.rem(h, jnp.int32(heads)) * blocks + n

    rows = pl.BlockSpec((None, None, block, shape.width), lambda n, h, b: (*row(n, h, b), 0))
    keys = pl.BlockSpec((None, None, shape.length, shape.width), lambda n, h, b: (*row(n, h, b)[:2], 0, 0))
    numbers = pl.BlockSpec((None, None, block), row)
    visible = pl.BlockSpec((None, block), lambda n, h, b: (b, n))
    out = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    number = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
    return _call(
        functools.partial(kernel, shape),
        grid=(blocks, shape.groups * shape.heads, shape.batch),
        in_specs=[rows, keys, keys, visible, visible, rows, numbers, numbers][: len(args)],
        out_specs=[rows, numbers, numbers][:outputs],
        out_shape=[out, number, number][:outputs],
        shape=shape,
        products=2 if outputs == 3 else 3,
        interpret=interpret,
    )(*args)


def _dkeys_dvalues(inputs: Step0Inputs, args: tuple[jax.Array, ...], interpret: bool) -> Any:
    """Runs the kernel of programs (block of keys, key head, batch)."""
    shape = _shape(inputs, DKEYS)
    rows = pl.BlockSpec((None, None, shape.heads * shape.slots, shape.width), lambda t, g, b: (b, g, 0, 0))
    keys = pl.BlockSpec((None, None, shape.blocks.keys, shape.width), lambda t, g, b: (b, g, t, 0))
    numbers = pl.BlockSpec((None, None, shape.heads * shape.slots), lambda t, g, b: (b, g, 0))
    visible = pl.BlockSpec((None, shape.slots), lambda t, g, b: (b, 0))
    reach = pl.BlockSpec((None, 1), lambda t, g, b: (b, t))
    return _call(
        functools.partial(_dkeys_dvalues_kernel, shape),
        grid=(shape.length // shape.blocks.keys, shape.groups, shape.batch),
        in_specs=[reach, reach, rows, keys, keys, visible, visible, rows, numbers, numbers],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(args[1].shape, jnp.float32)] * 2,
        shape=shape,
        products=4,
        interpret=interpret,
    )(*_reach(inputs, shape), *args)


def _arguments(inputs: Step0Inputs) -> tuple[jax.Array, ...]:
    """(Queries [B, G, M, C], keys and values [B, G, T, C], first and last [B, N]) as the kernels read them.

    M counts the N slots of a group's R heads, by head; C is padded to a power of two.
    """
    keys, values = (_wide(x.astype(inputs.dtype)) for x in (inputs.keys_BGTC, inputs.values_BGTC))
    first, last = (x.astype(jnp.int32) for x in (inputs.first_BN, inputs.last_BN))
    return _rows(inputs.queries_BGRNC.astype(inputs.dtype)), keys, values, first, last


def _rows(x_BGRNC: jax.Array) -> jax.Array:
    batch, groups, _, _, width = x_BGRNC.shape
    return _wide(x_BGRNC.reshape(batch, groups, -1, width))


def _wide(x: jax.Array) -> jax.Array:
    """Pads each row with zeros to a power of two, which Triton's blocks must be."""
    wanted = pl.next_power_of_2(max(x.shape[-1], SMALLEST))
    return x if wanted == x.shape[-1] else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wanted - x.shape[-1])])


class GPUKernelShape(NamedTuple):
    """The sizes of a call: R `heads` in each of the G `groups`, N `slots`, T positions (`length`), head width C."""

    batch: int
    groups: int
    heads: int
    slots: int
    length: int
    width: int
    blocks: Blocks


def _shape(inputs: Step0Inputs, table: dict[int, Blocks]) -> GPUKernelShape:
    batch, groups, heads, slots, width = inputs.queries_BGRNC.shape
    length, width = inputs.keys_BGTC.shape[2], pl.next_power_of_2(max(width, SMALLEST))
    table_width = width * (4 if jnp.dtype(inputs.dtype).itemsize == 4 else 1)
    blocks = next((blocks for limit, blocks in table.items() if table_width <= limit), LARGEST)
    # The table's sizes are powers of two, so that the gcd is the largest power of two that divides both.
    blocks = blocks._replace(slots=math.gcd(blocks.slots, slots), keys=math.gcd(blocks.keys, length))
    return GPUKernelShape(batch, groups, heads, slots, length, width, blocks)


def _call(kernel: Callable, *, shape: GPUKernelShape, products: int, interpret: bool, **args: Any) -> Callable:
    """The kernel's FLOPs are stated as if slots attended to all keys, since the true number depends on the data."""
    flops = products * 2 * shape.batch * shape.groups * shape.heads * shape.slots * shape.length * shape.width
    return pl.pallas_call(
        kernel,
        compiler_params=triton.CompilerParams(num_warps=shape.blocks.warps, num_stages=shape.blocks.stages),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),
        interpret=interpret,
        **args,
    )


def _reach(inputs: Step0Inputs, shape: GPUKernelShape) -> tuple[jax.Array, jax.Array]:
    """For each block of keys, the blocks of slots that attend to some of it: (the first, the one after the last).

    Both are int32 [B, blocks of keys], and 0 where no slot attends to the block.
    """
    blocks = (shape.batch, shape.slots // shape.blocks.slots, shape.blocks.slots)
    first_BX = inputs.first_BN.reshape(blocks).min(axis=2) // shape.blocks.keys
    last_BX = inputs.last_BN.reshape(blocks).max(axis=2) // shape.blocks.keys
    here_Y = jnp.arange(shape.length // shape.blocks.keys)[:, None]
    attends_BYX = (first_BX[:, None] <= here_Y) & (here_Y <= last_BX[:, None])
    block_X = jnp.arange(blocks[1])
    begin_BY = jnp.where(attends_BYX, block_X, blocks[1]).min(axis=2)
    end_BY = jnp.where(attends_BYX, block_X + 1, 0).max(axis=2)
    return jnp.minimum(begin_BY, end_BY).astype(jnp.int32), end_BY.astype(jnp.int32)


def _scores(a: jax.Array, b: jax.Array, here: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Masked scores of queries and the keys at positions `here`, or of keys and queries; times log2(e), for exp2."""
    return jnp.where((here >= first) & (here <= last), contract(a, b, (1, 1)) * LOG2_E, MASKED)


def _key_blocks(first: jax.Array, last: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The blocks of keys that some of the slots attend to: (the first, the one after the last)."""
    return jax.lax.div(jnp.min(first), jnp.int32(size)), jax.lax.div(jnp.max(last), jnp.int32(size)) + 1


def _forward_kernel(shape, q_ref, k_ref, v_ref, first_ref, last_ref, out_ref, top_ref, total_ref):
    queries, first, last, size = q_ref[...], first_ref[...], last_ref[...], shape.blocks.keys

    def body(t, carry):
        mixed, top, total = carry
        keys, values = (ref[pl.ds(t * size, size), :] for ref in (k_ref, v_ref))
        scores = _scores(
            queries, keys, t * size + jnp.arange(size, dtype=jnp.int32)[None], first[:, None], last[:, None]
        )
        # What a row sums over blocks that are masked for it, its first unmasked key scales down to zero.
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, fade = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
        total = total * fade + jnp.sum(weights, axis=1)
        return mixed * fade[:, None] + contract(weights.astype(values.dtype), values, (1, 0)), new, total

    nothing = jnp.zeros(queries.shape, jnp.float32), jnp.full(first.shape, MASKED), jnp.zeros(first.shape, jnp.float32)
    mixed, top, total = jax.lax.fori_loop(*_key_blocks(first, last, size), body, nothing)
    out_ref[...] = mixed
    top_ref[...] = top / LOG2_E
    total_ref[...] = total


def _dqueries_kernel(shape, q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, dot_ref, dq_ref):
    queries, dout, size = q_ref[...], dout_ref[...], shape.blocks.keys
    first, last, lse, dout_dot_out = first_ref[...], last_ref[...], lse_ref[...], dot_ref[...]

    def body(t, dqueries):
        keys, values = (ref[pl.ds(t * size, size), :] for ref in (k_ref, v_ref))
        scores = _scores(
            queries, keys, t * size + jnp.arange(size, dtype=jnp.int32)[None], first[:, None], last[:, None]
        )
        dweights = contract(dout, values, (1, 1))
        dscores = jnp.exp2(scores - lse[:, None]) * (dweights - dout_dot_out[:, None])
        return dqueries + contract(dscores.astype(keys.dtype), keys, (1, 0))

    nothing = jnp.zeros(queries.shape, jnp.float32)
    dq_ref[...] = jax.lax.fori_loop(*_key_blocks(first, last, size), body, nothing)


def _dkeys_dvalues_kernel(
    shape, begin_ref, end_ref, q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, dot_ref, dk_ref, dv_ref
):
    keys, values, size = k_ref[...], v_ref[...], shape.blocks.slots
    begin, end = begin_ref[0], end_ref[0]
    here = pl.program_id(0) * shape.blocks.keys + jnp.arange(shape.blocks.keys, dtype=jnp.int32)

    def body(i, carry):
        dkeys, dvalues = carry
        # All heads of the group in one loop: i counts the blocks of the first head, then those of the next.
        head, n = jax.lax.div(i, end - begin), begin + jax.lax.rem(i, end - begin)
        slots, rows = pl.ds(n * size, size), pl.ds(head * shape.slots + n * size, size)
        queries, dout = q_ref[rows, :], dout_ref[rows, :]
        # Keys by slots, as both gradients need them: slots by keys would be transposed in shared memory for each.
        scores = _scores(keys, queries, here[:, None], first_ref[slots][None], last_ref[slots][None])
        weights = jnp.exp2(scores - lse_ref[rows][None])
        dscores = weights * (contract(values, dout, (1, 1)) - dot_ref[rows][None])
        dkeys = dkeys + contract(dscores.astype(queries.dtype), queries, (1, 0))
        return dkeys, dvalues + contract(weights.astype(dout.dtype), dout, (1, 0))

    nothing = jnp.zeros(keys.shape, jnp.float32)
    dk_ref[...], dv_ref[...] = jax.lax.fori_loop(0, (end - begin) * shape.heads, body, (nothing, nothing))
