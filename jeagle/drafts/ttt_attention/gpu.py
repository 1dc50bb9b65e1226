"""Flash attention to the step-0 keys as Pallas kernels for GPUs, lowered by Triton.

A program takes a block of slots of one head through the keys that they see, or a block of keys of one key head through
the slots of its heads that see them; it starts and ends at the blocks that matter, so that neither the future nor other
documents cost anything. Sums stay in registers: nothing is added up in memory, and results do not vary from run to run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jeagle.drafts.ttt_attention.past import MASKED, Past

SMALLEST = 16  # rows of a matrix product
LOG2_E = math.log2(math.e)  # the exponential that a GPU has is that of two


class Blocks(NamedTuple):
    """Of a kernel: what a program takes at once, and how Triton spreads and pipelines it."""

    slots: int
    keys: int
    warps: int
    stages: int


# By the width of a head up to which they hold, in bfloat16, where an H100 makes all products by wgmma and spills no
# register. Products of float32 take more of them: it is looked up four times as wide.
FORWARD = {64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 4, 2), 512: Blocks(32, 32, 8, 1)}
DQUERIES = {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 4, 2), 512: Blocks(32, 16, 4, 1)}
DKEYS = {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 64, 8, 2), 512: Blocks(16, 32, 4, 1)}
LARGEST = Blocks(16, 16, 8, 1)


def divides(slots: int, length: int) -> bool:
    """Whether so many slots and positions divide into blocks."""
    return slots % SMALLEST == 0 and length % SMALLEST == 0


def forward(past: Past, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Past` says."""
    shape, args = _shape(past, FORWARD), _Args.of(past)
    rows, keys, numbers, seen = _specs_by_slots(shape)
    out = jax.ShapeDtypeStruct(args.queries_BGMC.shape, jnp.float32)
    number = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
    mixed, top, total = _call(
        functools.partial(_forward_kernel, shape),
        grid=(shape.slots // shape.blocks.slots, shape.groups * shape.heads, shape.batch),
        in_specs=[rows, keys, keys, seen, seen],
        out_specs=[rows, numbers, numbers],
        out_shape=[out, number, number],
        shape=shape,
        products=2,
        interpret=interpret,
    )(*args)
    by_head = past.queries_BGRNC.shape
    return _of_width(mixed, past).reshape(by_head), *(x.reshape(*by_head[:-1], 1) for x in (top, total))


def backward(
    past: Past, dout: jax.Array, lse: jax.Array, taken: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Past` says."""
    args = _Args.of(past)
    numbers = args.queries_BGMC.shape[:3]
    given = (*args, _rows(dout.astype(past.dtype)), lse.reshape(numbers) * LOG2_E, taken.reshape(numbers))
    dqueries = _of_width(_dqueries(past, interpret)(*given), past).reshape(past.queries_BGRNC.shape)
    dkeys, dvalues = _dkeys_dvalues(past, interpret)(*_reach(past, _shape(past, DKEYS)), *given)
    return dqueries, _of_width(dkeys, past), _of_width(dvalues, past)


def _dqueries(past: Past, interpret: bool) -> Callable[..., jax.Array]:
    shape = _shape(past, DQUERIES)
    rows, keys, numbers, seen = _specs_by_slots(shape)
    return _call(
        functools.partial(_dqueries_kernel, shape),
        grid=(shape.slots // shape.blocks.slots, shape.groups * shape.heads, shape.batch),
        in_specs=[rows, keys, keys, seen, seen, rows, numbers, numbers],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(
            (shape.batch, shape.groups, shape.heads * shape.slots, shape.width), jnp.float32
        ),
        shape=shape,
        products=3,
        interpret=interpret,
    )


def _dkeys_dvalues(past: Past, interpret: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    shape = _shape(past, DKEYS)
    rows = pl.BlockSpec((None, None, shape.heads * shape.slots, shape.width), lambda t, g, b: (b, g, 0, 0))
    keys = pl.BlockSpec((None, None, shape.blocks.keys, shape.width), lambda t, g, b: (b, g, t, 0))
    numbers = pl.BlockSpec((None, None, shape.heads * shape.slots), lambda t, g, b: (b, g, 0))
    seen = pl.BlockSpec((None, shape.slots), lambda t, g, b: (b, 0))
    reach = pl.BlockSpec((None, 1), lambda t, g, b: (b, t))
    out = jax.ShapeDtypeStruct((shape.batch, shape.groups, shape.length, shape.width), jnp.float32)
    return _call(
        functools.partial(_dkeys_dvalues_kernel, shape),
        grid=(shape.length // shape.blocks.keys, shape.groups, shape.batch),
        in_specs=[reach, reach, rows, keys, keys, seen, seen, rows, numbers, numbers],
        out_specs=[keys, keys],
        out_shape=[out, out],
        shape=shape,
        products=4,
        interpret=interpret,
    )


class _Args(NamedTuple):
    """M are the R heads of a group, one behind the other, of N slots each; C is a power of two."""

    queries_BGMC: jax.Array
    keys_BGTC: jax.Array
    values_BGTC: jax.Array
    first_BN: jax.Array
    last_BN: jax.Array

    @staticmethod
    def of(past: Past) -> _Args:
        keys, values = (_wide(x.astype(past.dtype)) for x in (past.keys_BGTC, past.values_BGTC))
        first, last = (x.astype(jnp.int32) for x in (past.first_BN, past.last_BN))
        return _Args(_rows(past.queries_BGRNC.astype(past.dtype)), keys, values, first, last)


def _rows(x_BGRNC: jax.Array) -> jax.Array:
    batch, groups, _, _, width = x_BGRNC.shape
    return _wide(x_BGRNC.reshape(batch, groups, -1, width))


def _wide(x: jax.Array) -> jax.Array:
    """Zeros behind each row up to a power of two, which Triton's blocks must be."""
    wanted = pl.next_power_of_2(max(x.shape[-1], SMALLEST))
    return x if wanted == x.shape[-1] else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wanted - x.shape[-1])])


def _of_width(x: jax.Array, past: Past) -> jax.Array:
    return x[..., : past.keys_BGTC.shape[-1]]


class Shape(NamedTuple):
    """Of one call: `heads` R of each of the `groups` G, N `slots`, T positions, C wide."""

    batch: int
    groups: int
    heads: int
    slots: int
    length: int
    width: int
    blocks: Blocks


def _shape(past: Past, table: dict[int, Blocks]) -> Shape:
    batch, groups, heads, slots, width = past.queries_BGRNC.shape
    length, width = past.keys_BGTC.shape[2], pl.next_power_of_2(max(width, SMALLEST))
    room = width * (4 if jnp.dtype(past.dtype).itemsize == 4 else 1)
    blocks = next((blocks for limit, blocks in table.items() if room <= limit), LARGEST)
    # Powers of two both: the largest divisor of the sizes up to the table's.
    blocks = blocks._replace(slots=math.gcd(blocks.slots, slots), keys=math.gcd(blocks.keys, length))
    return Shape(batch, groups, heads, slots, length, width, blocks)


def _call(kernel: Callable, *, shape: Shape, products: int, interpret: bool, **args: Any) -> Callable:
    """The kernel's FLOPs are given as if no key were out of sight, since their number lies in the data."""
    flops = products * 2 * shape.batch * shape.groups * shape.heads * shape.slots * shape.length * shape.width
    return pl.pallas_call(
        kernel,
        compiler_params=triton.CompilerParams(num_warps=shape.blocks.warps, num_stages=shape.blocks.stages),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),
        interpret=interpret,
        **args,
    )


def _specs_by_slots(shape: Shape) -> tuple[pl.BlockSpec, ...]:
    """Of rows, keys, one number a row, and one a slot, for programs (block of slots, head, batch).

    What a block holds is not loaded by itself: a kernel loads what it reads of it.
    """
    block, blocks, heads = shape.blocks.slots, shape.slots // shape.blocks.slots, shape.heads

    def group(h: jax.Array) -> jax.Array:
        return jax.lax.div(h, jnp.int32(heads))

    def row(n: jax.Array, h: jax.Array) -> jax.Array:
        return jax.lax.rem(h, jnp.int32(heads)) * blocks + n

    rows = pl.BlockSpec((None, None, block, shape.width), lambda n, h, b: (b, group(h), row(n, h), 0))
    keys = pl.BlockSpec((None, None, shape.length, shape.width), lambda n, h, b: (b, group(h), 0, 0))
    numbers = pl.BlockSpec((None, None, block), lambda n, h, b: (b, group(h), row(n, h)))
    return rows, keys, numbers, pl.BlockSpec((None, block), lambda n, h, b: (b, n))


def _reach(past: Past, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Of each block of keys, the first block of slots some of which see some of it, and the one after the last: int32
    [B, blocks of keys] each; both 0 where none does.
    """
    blocks = (shape.batch, shape.slots // shape.blocks.slots, shape.blocks.slots)
    first_BX = past.first_BN.reshape(blocks).min(axis=2) // shape.blocks.keys
    last_BX = past.last_BN.reshape(blocks).max(axis=2) // shape.blocks.keys
    here_Y = jnp.arange(shape.length // shape.blocks.keys)[:, None]
    sees_BYX = (first_BX[:, None] <= here_Y) & (here_Y <= last_BX[:, None])
    place_X = jnp.arange(blocks[1])
    begin_BY = jnp.where(sees_BYX, place_X, blocks[1]).min(axis=2)
    end_BY = jnp.where(sees_BYX, place_X + 1, 0).max(axis=2)
    return jnp.minimum(begin_BY, end_BY).astype(jnp.int32), end_BY.astype(jnp.int32)


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Over axis `contracted[0]` of a and `contracted[1]` of b, in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def _scores(a: jax.Array, b: jax.Array, here: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Of queries and the keys at positions `here`, or of keys and queries, to the base of two; masked."""
    return jnp.where((here >= first) & (here <= last), _product(a, b, (1, 1)) * LOG2_E, MASKED)


def _places(begin: jax.Array, size: int) -> jax.Array:
    return begin + jnp.arange(size, dtype=jnp.int32)


def _key_blocks(first: jax.Array, last: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that some of the slots sees, and the one after the last."""
    return jax.lax.div(jnp.min(first), jnp.int32(size)), jax.lax.div(jnp.max(last), jnp.int32(size)) + 1


def _forward_kernel(shape, q_ref, k_ref, v_ref, first_ref, last_ref, out_ref, top_ref, total_ref):
    queries, first, last, size = q_ref[...], first_ref[...], last_ref[...], shape.blocks.keys

    def body(t, carry):
        mixed, top, total = carry
        keys, values = (ref[pl.ds(t * size, size), :] for ref in (k_ref, v_ref))
        scores = _scores(queries, keys, _places(t * size, size)[None], first[:, None], last[:, None])
        # A row that sees nothing of its first blocks gathers what the first key that it sees scales down to zero.
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, fade = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
        total = total * fade + jnp.sum(weights, axis=1)
        return mixed * fade[:, None] + _product(weights.astype(values.dtype), values, (1, 0)), new, total

    nothing = jnp.zeros(queries.shape, jnp.float32), jnp.full(first.shape, MASKED), jnp.zeros(first.shape, jnp.float32)
    mixed, top, total = jax.lax.fori_loop(*_key_blocks(first, last, size), body, nothing)
    out_ref[...] = mixed
    top_ref[...] = top / LOG2_E
    total_ref[...] = total


def _dqueries_kernel(shape, q_ref, k_ref, v_ref, first_ref, last_ref, dout_ref, lse_ref, taken_ref, dq_ref):
    queries, dout, size = q_ref[...], dout_ref[...], shape.blocks.keys
    first, last, lse, taken = first_ref[...], last_ref[...], lse_ref[...], taken_ref[...]

    def body(t, dqueries):
        keys, values = (ref[pl.ds(t * size, size), :] for ref in (k_ref, v_ref))
        scores = _scores(queries, keys, _places(t * size, size)[None], first[:, None], last[:, None])
        dweights = _product(dout, values, (1, 1))
        dscores = jnp.exp2(scores - lse[:, None]) * (dweights - taken[:, None])
        return dqueries + _product(dscores.astype(keys.dtype), keys, (1, 0))

    nothing = jnp.zeros(queries.shape, jnp.float32)
    dq_ref[...] = jax.lax.fori_loop(*_key_blocks(first, last, size), body, nothing)


def _dkeys_dvalues_kernel(
    shape,
    begin_ref,
    end_ref,
    q_ref,
    k_ref,
    v_ref,
    first_ref,
    last_ref,
    dout_ref,
    lse_ref,
    taken_ref,
    dk_ref,
    dv_ref,
):
    keys, values, size = k_ref[...], v_ref[...], shape.blocks.slots
    begin, end = begin_ref[0], end_ref[0]
    here = _places(pl.program_id(0) * shape.blocks.keys, shape.blocks.keys)

    def body(i, carry):
        dkeys, dvalues = carry
        # All heads of the group in one loop: i counts through the blocks of one, then through those of the next.
        head, n = jax.lax.div(i, end - begin), begin + jax.lax.rem(i, end - begin)
        slots, rows = pl.ds(n * size, size), pl.ds(head * shape.slots + n * size, size)
        queries, dout = q_ref[rows, :], dout_ref[rows, :]
        # Keys by slots, as both gradients take them: the other way round, each would be transposed in shared memory.
        scores = _scores(keys, queries, here[:, None], first_ref[slots][None], last_ref[slots][None])
        weights = jnp.exp2(scores - lse_ref[rows][None])
        dscores = weights * (_product(values, dout, (1, 1)) - taken_ref[rows][None])
        dkeys = dkeys + _product(dscores.astype(queries.dtype), queries, (1, 0))
        return dkeys, dvalues + _product(weights.astype(dout.dtype), dout, (1, 0))

    nothing = jnp.zeros(keys.shape, jnp.float32)
    dk_ref[...], dv_ref[...] = jax.lax.fori_loop(0, (end - begin) * shape.heads, body, (nothing, nothing))
