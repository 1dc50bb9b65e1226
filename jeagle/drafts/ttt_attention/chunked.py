"""The backend in plain XLA, block by block of slots: memory is linear in T, since scores exist for one block at a time.

A block reads only the keys up to the last position that its slots can have.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jeagle.drafts.ttt_attention.reference import MASKED, Step0Inputs
from jeagle.runtime.xla_workarounds import keep_apart, keep_in_loop

BLOCK = 128
"""Slots whose scores exist at a time."""
BANDS, SMALLEST_BAND = 8, 64
"""Parts that a row's slots are divided into, each with its own end of the keys; and the fewest slots of a part."""


def forward(inputs: Step0Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""

    def attend_block(end, sums, queries, visible):
        scores = _scores(inputs, end, queries, visible)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        return sums, (_product("bgrnt,bgtc->bgrnc", inputs.dtype, weights, inputs.values_BGTC[:, :, :end]), top, total)

    return _over_blocks(inputs, attend_block, (), (inputs.queries_BGRNC, _visible(inputs)))[1]


def backward(
    inputs: Step0Inputs, dout: jax.Array, lse: jax.Array, dout_dot_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Step0Inputs` describes it."""

    def attend_block(end, sums, queries, visible, dout, lse, dout_dot_out):
        weights = jnp.exp(_scores(inputs, end, queries, visible) - lse)
        dweights = _product("bgrnc,bgtc->bgrnt", inputs.dtype, dout, inputs.values_BGTC[:, :, :end])
        dscores = weights * (dweights - dout_dot_out)
        # The narrower operand first, as in `xla_workarounds.contract_rows`: the keys' gradients come out as [C, T].
        dkeys = _product("bgrnc,bgrnt->bgct", inputs.dtype, queries, dscores)
        dvalues = _product("bgrnc,bgrnt->bgct", inputs.dtype, dout, weights)
        dqueries = _product("bgrnt,bgtc->bgrnc", inputs.dtype, dscores, inputs.keys_BGTC[:, :, :end])
        return (sums[0] + dkeys, sums[1] + dvalues), (dqueries,)

    batch, groups, _, width = inputs.keys_BGTC.shape
    nothing = jnp.zeros((batch, groups, width, 0), dout.dtype)
    given = (inputs.queries_BGRNC, _visible(inputs), dout, lse, dout_dot_out)
    sums, (dqueries,) = _over_blocks(inputs, attend_block, (nothing, nothing), given)
    dkeys_BGCT, dvalues_BGCT = keep_apart(sums)
    return dqueries, jnp.swapaxes(dkeys_BGCT, 2, 3), jnp.swapaxes(dvalues_BGCT, 2, 3)


def _visible(inputs: Step0Inputs) -> jax.Array:
    """The first and the last position of each slot's keys, [B, 1, 1, N, 2]: slots on the same axis as in queries."""
    return jnp.stack([inputs.first_BN, inputs.last_BN], axis=-1)[:, None, None]


def _product(formula: str, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    total = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(formula, a.astype(dtype), b.astype(dtype), preferred_element_type=total)


def _scores(inputs: Step0Inputs, end: int, queries: jax.Array, visible: jax.Array) -> jax.Array:
    queries, visible = keep_in_loop((queries, visible))
    scores = _product("bgrnc,bgtc->bgrnt", inputs.dtype, queries, inputs.keys_BGTC[:, :, :end])
    here_T = jnp.arange(end)
    return jnp.where((here_T >= visible[..., :1]) & (here_T <= visible[..., 1:]), scores, MASKED)


def bands(slots: int, length: int) -> list[tuple[int, int, int]]:
    """The N slots in at most BANDS equal parts: (first slot, slot after the last, end of the keys that the part reads).

    Positions rise along a row, so slot n, which has N - 1 - n slots behind it, has position T - N + n at most.
    """
    count = max(d for d in range(1, BANDS + 1) if slots % d == 0 and (d == 1 or slots // d >= SMALLEST_BAND))
    width = slots // count
    return [(i * width, (i + 1) * width, length - slots + (i + 1) * width) for i in range(count)]


def _over_blocks(inputs: Step0Inputs, attend_block: Callable, sums: Any, slotwise: tuple[jax.Array, ...]) -> Any:
    """Runs `attend_block(end, sums, *block of slotwise) -> (sums, the block's results)` over all blocks of slots.

    A block reads keys 0 to end. Slots are axis 3 of `slotwise` and of the results; `sums` are [..., end], padded with
    zeros as `end` rises.
    """
    results = []
    for start, stop, end in bands(inputs.last_BN.shape[1], inputs.keys_BGTC.shape[2]):
        sums = jax.tree.map(lambda x, end=end: jnp.pad(x, [(0, 0)] * 3 + [(0, end - x.shape[3])]), sums)
        here = tuple(x[:, :, :, start:stop] for x in slotwise)
        blocks = (stop - start) // BLOCK if (stop - start) % BLOCK == 0 else 1
        if blocks <= 1:
            sums, result = attend_block(end, sums, *here)
        else:
            split = tuple(jnp.moveaxis(x.reshape(*x.shape[:3], blocks, -1, x.shape[4]), 3, 0) for x in here)
            sums, result = jax.lax.scan(lambda s, x, end=end: attend_block(end, s, *x), sums, split)
            result = tuple(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[5]) for x in result)
        results.append(result)
    return sums, tuple(jnp.concatenate(x, axis=3) for x in zip(*results, strict=True))
