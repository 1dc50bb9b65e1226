"""Plain XLA, in blocks of slots: scores exist for one block at a time, so memory is linear in T; and a block reads keys
only as far as its slots can see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jeagle.drafts.ttt_attention.past import MASKED, Past

BLOCK = 128  # slots whose scores exist at a time
BANDS = 8
SMALLEST_BAND = 64


def forward(past: Past) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Past` says."""

    def one(end, sums, queries, seen):
        scores = _scores(past, end, queries, seen)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        return sums, (_product("bgrnt,bgtc->bgrnc", past.dtype, weights, past.values_BGTC[:, :, :end]), top, total)

    return _over_blocks(past, one, (), (past.queries_BGRNC, _seen(past)))[1]


def backward(past: Past, dout: jax.Array, lse: jax.Array, taken: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Past` says."""

    def one(end, sums, queries, seen, dout, lse, taken):
        weights = jnp.exp(_scores(past, end, queries, seen) - lse)
        dweights = _product("bgrnc,bgtc->bgrnt", past.dtype, dout, past.values_BGTC[:, :, :end])
        dscores = weights * (dweights - taken)
        # The narrow operand first, which XLA's CPU backend copies transposed: the keys' gradients come out as [C, T].
        dkeys = _product("bgrnc,bgrnt->bgct", past.dtype, queries, dscores)
        dvalues = _product("bgrnc,bgrnt->bgct", past.dtype, dout, weights)
        dqueries = _product("bgrnt,bgtc->bgrnc", past.dtype, dscores, past.keys_BGTC[:, :, :end])
        return (sums[0] + dkeys, sums[1] + dvalues), (dqueries,)

    batch, groups, _, width = past.keys_BGTC.shape
    nothing = jnp.zeros((batch, groups, width, 0), dout.dtype)
    given = (past.queries_BGRNC, _seen(past), dout, lse, taken)
    sums, (dqueries,) = _over_blocks(past, one, (nothing, nothing), given)
    # Without the barrier XLA merges the transposition into the product, which its CPU backend cannot do in bfloat16.
    dkeys_BGCT, dvalues_BGCT = jax.lax.optimization_barrier(sums)
    return dqueries, jnp.swapaxes(dkeys_BGCT, 2, 3), jnp.swapaxes(dvalues_BGCT, 2, 3)


def _seen(past: Past) -> jax.Array:
    """First and last key of each slot, [B, 1, 1, N, 2]: slots on the axis where queries have them."""
    return jnp.stack([past.first_BN, past.last_BN], axis=-1)[:, None, None]


def _product(formula: str, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    total = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(formula, a.astype(dtype), b.astype(dtype), preferred_element_type=total)


def _scores(past: Past, end: int, queries: jax.Array, seen: jax.Array) -> jax.Array:
    # Or JAX would take the masks, which no TTT step changes, out of the scans and keep them for all blocks at once.
    queries, seen = jax.lax.optimization_barrier((queries, seen))
    scores = _product("bgrnc,bgtc->bgrnt", past.dtype, queries, past.keys_BGTC[:, :, :end])
    here_T = jnp.arange(end)
    return jnp.where((here_T >= seen[..., :1]) & (here_T <= seen[..., 1:]), scores, MASKED)


def bands(slots: int, length: int) -> list[tuple[int, int, int]]:
    """The N slots in up to `BANDS` equal parts: (first slot, slot after the last, keys that the part can see).

    Positions rise along a row, so slot n, which has N - 1 - n others behind it, lies at T - N + n at most.
    """
    count = max(d for d in range(1, BANDS + 1) if slots % d == 0 and (d == 1 or slots // d >= SMALLEST_BAND))
    width = slots // count
    return [(i * width, (i + 1) * width, length - slots + (i + 1) * width) for i in range(count)]


def _over_blocks(past: Past, one: Callable, sums: Any, slotwise: tuple[jax.Array, ...]) -> Any:
    """`one(end, sums, *block of slotwise) -> (sums, block's results)` over all blocks, of keys 0 to end.

    Slots are on axis 3 of `slotwise` and of the results; `sums` are [..., T], cut or filled with zeros to `end`.
    """
    results = []
    for start, stop, end in bands(past.last_BN.shape[1], past.keys_BGTC.shape[2]):
        sums = jax.tree.map(lambda x, end=end: jnp.pad(x, [(0, 0)] * 3 + [(0, end - x.shape[3])]), sums)
        here = tuple(x[:, :, :, start:stop] for x in slotwise)
        blocks = (stop - start) // BLOCK if (stop - start) % BLOCK == 0 else 1
        if blocks <= 1:
            sums, found = one(end, sums, *here)
        else:
            split = tuple(jnp.moveaxis(x.reshape(*x.shape[:3], blocks, -1, x.shape[4]), 3, 0) for x in here)
            sums, found = jax.lax.scan(lambda s, x, end=end: one(end, s, *x), sums, split)
            found = tuple(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[5]) for x in found)
        results.append(found)
    return sums, tuple(jnp.concatenate(x, axis=3) for x in zip(*results, strict=True))
