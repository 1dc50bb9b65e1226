"""Everything that moves along time: shifts by one, and the choice of positions.

Tokens x_0 .. x_{T-1}; f_t is the target's feature at position t, which has read x_0..x_t. Slot t at TTT step k:

    slot                      t
    feature it starts from    f_t
    token it reads            x_{t+1+k}      its `read` position, which is also the position that teaches it
    taught by                 the target's distribution after x_{t+1+k}
    label                     x_{t+2+k}

All functions take and return arrays with the time axis last, work on numpy and JAX arrays alike (pass `xp`), and never
let a slot reach into another document unless `cross_documents` says so.

Source: EAGLE-3 (arXiv 2503.01840), section 3; the peers' conventions are named at each rule.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.interfaces import Batch

SlotRule = Literal["served", "predicted", "specforge", "speculators"]
SLOT_RULES: tuple[SlotRule, ...] = ("served", "predicted", "specforge", "speculators")


def shift_left(array_BT: Any, by: int, *, fill: Any = 0, xp: ModuleType = jnp) -> Any:
    """array[t] becomes array[t + by]; the places that run out hold `fill`.

    by=2:  a b c d e  ->  c d e . .
    """
    if by == 0:
        return array_BT
    length = array_BT.shape[-1]
    by = min(by, length)
    pad = [(0, 0)] * (array_BT.ndim - 1) + [(0, by)]
    return xp.pad(array_BT[..., by:], pad, constant_values=fill)


def same_document(segments_BT: Any, ahead: int, *, xp: ModuleType = jnp) -> Any:
    """Whether position t + ahead lies in the document of position t (bool [B,T]).

    ahead=1, segments 1 1 2 2 0  ->  T F T F F
    """
    return (shift_left(segments_BT, ahead, xp=xp) == segments_BT) & (segments_BT != 0)


def read_positions(segments_BT: Any, steps: int, *, cross_documents: bool = False, xp: ModuleType = jnp) -> Any:
    """Position of the token that slot t reads at each step: int32 [K,B,T], T where there is none.

    Within documents this is t + 1 + k. With `cross_documents` (speculators) the shift runs over the slots that have a
    next token, so that it steps from a document's last token to the next document's second:

        tokens      a0 a1 a2 b0 b1 b2        slots that exist: a0 a1 b0 b1
        step 0      a1 a2  . b1 b2  .
        step 1      a2 b1  . b2  .  .
    """
    length = segments_BT.shape[-1]
    slots_BT = same_document(segments_BT, 1, xp=xp)
    here_T = xp.arange(length)
    if not cross_documents:
        reads = [xp.where(same_document(segments_BT, 1 + k, xp=xp), here_T + 1 + k, length) for k in range(steps)]
        return xp.stack(reads).astype(xp.int32)
    order_BT = xp.argsort(~slots_BT, axis=-1, stable=True)
    rank_BT = xp.cumsum(slots_BT, axis=-1) - 1
    total_B1 = slots_BT.sum(axis=-1, keepdims=True)
    reads = []
    for k in range(steps):
        ahead_BT = xp.take_along_axis(order_BT, xp.minimum(rank_BT + k, length - 1), axis=-1)
        reads.append(xp.where(slots_BT & (rank_BT + k < total_B1), ahead_BT + 1, length))
    return xp.stack(reads).astype(xp.int32)


def counting_slots(
    batch: Batch, steps: int, rule: SlotRule, *, cross_documents: bool = False, xp: ModuleType = jnp
) -> Any:
    """Which slots count at which TTT step: bool [K,B,T].

    For a document  p p A A A A  (p prompt, A answer) and k = 0:

        slot t            0 1 2 3 4 5
        reads x_{t+1}     p A A A A .
        label x_{t+2}     A A A A . .
        served            . T T T . .     x_{t+1} .. x_{t+2+k} all of one answer
        predicted         T T T T . .     the label is an answer token
        specforge         . . T T T .     the mask bit of token t + k, never the last one
        speculators       . T T T T .     the mask bit of the token read

    Raises:
      ValueError: for a rule that is not in `SLOT_RULES`.
    """
    supervised_BT, segments_BT = batch.supervised_BT, batch.segments_BT
    if rule == "served":
        return _served(supervised_BT, segments_BT, steps, xp)
    if rule == "predicted":
        counts = [
            shift_left(supervised_BT, 2 + k, fill=False, xp=xp) & same_document(segments_BT, 2 + k, xp=xp)
            for k in range(steps)
        ]
        return xp.stack(counts)
    if rule not in ("specforge", "speculators"):
        raise ValueError(f"unknown slot rule {rule!r}: one of {', '.join(SLOT_RULES)}")
    length = segments_BT.shape[-1]
    reads_KBT = read_positions(segments_BT, steps, cross_documents=cross_documents, xp=xp)
    bit_KBT = xp.clip(reads_KBT - (1 if rule == "specforge" else 0), 0, length - 1)
    bits = [xp.take_along_axis(supervised_BT, bit_KBT[k], axis=-1) for k in range(steps)]
    return xp.stack(bits) & (reads_KBT < length)


def _served(supervised_BT: Any, segments_BT: Any, steps: int, xp: ModuleType) -> Any:
    run_BT = shift_left(supervised_BT, 1, fill=False, xp=xp)
    counts = []
    for k in range(steps):
        run_BT = run_BT & shift_left(supervised_BT, 2 + k, fill=False, xp=xp)
        counts.append(run_BT & same_document(segments_BT, 2 + k, xp=xp))
    return xp.stack(counts)


def near_supervised(batch: Batch, *, xp: ModuleType = jnp) -> Any:
    """The positions that may teach a slot, whatever the rule: bool [B, T].

    A position teaches by the target's distribution after its token; every rule of `SLOT_RULES` asks that this token,
    the one before or the one after be supervised, in one document.

    supervised . . A A . .  ->  . T T T T .
    """
    supervised_BT, segments_BT = batch.supervised_BT, batch.segments_BT
    after_BT = shift_left(supervised_BT, 1, fill=False, xp=xp) & same_document(segments_BT, 1, xp=xp)
    reversed_BT = supervised_BT[..., ::-1], segments_BT[..., ::-1]
    before_BT = shift_left(reversed_BT[0], 1, fill=False, xp=xp) & same_document(reversed_BT[1], 1, xp=xp)
    return (supervised_BT | after_BT | before_BT[..., ::-1]) & (segments_BT != 0)


class Selected(NamedTuple):
    """Positions [B, N], rising along a row; `live` is false on those that only fill the width up."""

    positions_BN: jax.Array
    live_BN: jax.Array


def select(wanted_BT: jax.Array, width: int) -> Selected:
    """The positions where `wanted` holds, first `width` of each row.

    The caller guarantees that `width` suffices; rows with fewer are filled up with their first unwanted positions.
    """
    if width >= wanted_BT.shape[1]:
        positions = jnp.broadcast_to(jnp.arange(wanted_BT.shape[1]), wanted_BT.shape)
        return Selected(positions.astype(jnp.int32), wanted_BT)
    order = jnp.sort(jnp.argsort(~wanted_BT, axis=1, stable=True)[:, :width], axis=1)
    return Selected(order.astype(jnp.int32), jnp.take_along_axis(wanted_BT, order, axis=1))


def take_rows(array_BTX: jax.Array, positions_BN: jax.Array) -> jax.Array:
    """array[b, positions[b, n]]: [B, T, ...] -> [B, N, ...]."""
    rows = jnp.arange(array_BTX.shape[0])[:, None]
    return array_BTX[rows, positions_BN]


def teacher_positions(counts_KBT: Any, reads_KBT: Any, *, xp: ModuleType = jnp) -> Any:
    """The positions that teach some counting slot: bool [B, T]."""
    length = counts_KBT.shape[-1]
    places = xp.where(counts_KBT, reads_KBT, length)
    if xp is jnp:
        rows = jnp.arange(places.shape[1])[None, :, None]
        return jnp.zeros(places.shape[1:], bool).at[rows, places].set(True, mode="drop")
    taught = xp.zeros((places.shape[1], length + 1), bool)
    for places_BT in places:
        xp.put_along_axis(taught, places_BT, True, axis=1)
    return taught[:, :length]
