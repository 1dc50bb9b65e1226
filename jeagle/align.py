"""Everything that moves along time: shifts by one, and the choice of positions.

Tokens x_0 .. x_{T-1}; f_t is the target's feature at position t, which has read x_0..x_t. Slot t at TTT step k:

    slot                      t
    feature it starts from    f_t
    token it reads            x_{t+1+k}, at its `read` position
    teacher                   the target's distribution after x_{t+1+k}, at the same position
    label                     x_{t+2+k}

All functions take and return arrays with the time axis last. They accept NumPy and JAX arrays (pass `xp`), and a slot
never reads from another document unless `cross_documents` is true.

Source: EAGLE-3 (arXiv 2503.01840), section 3; each rule names the trainer whose convention it is.
"""

from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jeagle.interfaces import Batch

SlotRule = Literal["served", "predicted", "specforge", "speculators"]
SLOT_RULES: tuple[SlotRule, ...] = get_args(SlotRule)


def shift_left(array_BT: Any, by: int, *, fill: Any = 0, xp: ModuleType = jnp) -> Any:
    """array[t] becomes array[t + by]; the last `by` entries become `fill`.

    by=2:  a b c d e  ->  c d e . .
    """
    by = min(by, array_BT.shape[-1])
    pad = [(0, 0)] * (array_BT.ndim - 1) + [(0, by)]
    return xp.pad(array_BT[..., by:], pad, constant_values=fill)


def same_document(segments_BT: Any, ahead: int, *, xp: ModuleType = jnp) -> Any:
    """Whether position t + ahead lies in the document of position t (bool [B,T]).

    ahead=1, segments 1 1 2 2 0  ->  T F T F F
    """
    return (shift_left(segments_BT, ahead, xp=xp) == segments_BT) & (segments_BT != 0)


def document_starts(segments_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of the first token of each position's document; a row's padding counts as a document. JAX arrays only.

    segments 1 1 2 2 0  ->  0 0 2 2 4
    """
    here_T = jnp.arange(segments_BT.shape[1])
    starts_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(starts_BT, here_T, 0), axis=1)


def read_positions(segments_BT: Any, steps: int, *, cross_documents: bool = False, xp: ModuleType = jnp) -> Any:
    """Position of the token that slot t reads at each step: int32 [K,B,T]; T where it reads none.

    Within documents this is t + 1 + k. With `cross_documents` (speculators) the shift counts only slots that have a
    next token, so that it goes from a document's last token to the next document's second one:

        tokens      a0 a1 a2 b0 b1 b2        slots that exist: a0 a1 b0 b1
        step 0      a1 a2  . b1 b2  .
        step 1      a2 b1  . b2  .  .
    """
    length = segments_BT.shape[-1]
    if not cross_documents:
        here_T = xp.arange(length)
        reads = [xp.where(same_document(segments_BT, 1 + k, xp=xp), here_T + 1 + k, length) for k in range(steps)]
        return xp.stack(reads).astype(xp.int32)
    slots_BT = same_document(segments_BT, 1, xp=xp)
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
        served            . T T T . .     x_{t+1} .. x_{t+2+k} are all tokens of one answer
        predicted         T T T T . .     the label is an answer token
        specforge         . . T T T .     the mask bit of token t + k, never the last one
        speculators       . T T T T .     the mask bit of the token read

    Raises:
      ValueError: for a rule that is not in `SLOT_RULES`.
    """
    supervised_BT, segments_BT = batch.supervised_BT, batch.segments_BT
    if rule not in SLOT_RULES:
        raise ValueError(f"The slot rule {rule!r} is unknown; the rules are {', '.join(SLOT_RULES)}.")
    if rule in ("served", "predicted"):
        counts, run_BT = [], shift_left(supervised_BT, 1, fill=False, xp=xp)
        for k in range(steps):
            label_BT = shift_left(supervised_BT, 2 + k, fill=False, xp=xp)
            run_BT = run_BT & label_BT if rule == "served" else label_BT
            counts.append(run_BT & same_document(segments_BT, 2 + k, xp=xp))
        return xp.stack(counts)
    length = segments_BT.shape[-1]
    reads_KBT = read_positions(segments_BT, steps, cross_documents=cross_documents, xp=xp)
    bit_KBT = xp.clip(reads_KBT - (1 if rule == "specforge" else 0), 0, length - 1)
    bits = [xp.take_along_axis(supervised_BT, bit_KBT[k], axis=-1) for k in range(steps)]
    return xp.stack(bits) & (reads_KBT < length)


def near_supervised(batch: Batch, *, xp: ModuleType = jnp) -> Any:
    """The positions that may be a slot's teacher under any rule: bool [B, T].

    A position teaches with the target's distribution after its token. Every rule of `SLOT_RULES` requires that this
    token, the one before it or the one after it is supervised, in the same document.

    supervised . . A A . .  ->  . T T T T .
    """
    supervised_BT, segments_BT = batch.supervised_BT, batch.segments_BT
    after_BT = shift_left(supervised_BT, 1, fill=False, xp=xp) & same_document(segments_BT, 1, xp=xp)
    reversed_BT = supervised_BT[..., ::-1], segments_BT[..., ::-1]
    before_BT = shift_left(reversed_BT[0], 1, fill=False, xp=xp) & same_document(reversed_BT[1], 1, xp=xp)
    return (supervised_BT | after_BT | before_BT[..., ::-1]) & (segments_BT != 0)


class Selected(NamedTuple):
    """Positions [B, N], rising along a row; `live` is false for those that only pad the row to N."""

    positions_BN: Int[Array, "B N"]
    live_BN: Bool[Array, "B N"]


def select(wanted_BT: Bool[Array, "B T"], width: int) -> Selected:
    """The positions where `wanted` is true, gathered to N = `width` per row.

    The caller guarantees that `width` suffices; rows with fewer are padded with their first other positions.
    """
    if width >= wanted_BT.shape[1]:
        positions = jnp.broadcast_to(jnp.arange(wanted_BT.shape[1]), wanted_BT.shape)
        return Selected(positions.astype(jnp.int32), wanted_BT)
    order = jnp.sort(jnp.argsort(~wanted_BT, axis=1, stable=True)[:, :width], axis=1)
    return Selected(order.astype(jnp.int32), jnp.take_along_axis(wanted_BT, order, axis=1))


def take_rows(array_BTX: Shaped[Array, "B T ..."], positions_BN: Int[Array, "B N"]) -> Shaped[Array, "B N ..."]:
    """array[b, positions[b, n]] for all b and n: [B, T, ...] -> [B, N, ...]."""
    rows = jnp.arange(array_BTX.shape[0])[:, None]
    return array_BTX[rows, positions_BN]


def teacher_positions(counts_KBT: Any, reads_KBT: Any, *, xp: ModuleType = jnp) -> Any:
    """The positions that teach a slot that counts, at any step: bool [B, T]."""
    length = counts_KBT.shape[-1]
    at_KBT, rows = xp.where(counts_KBT, reads_KBT, length), xp.arange(counts_KBT.shape[1])[None, :, None]
    if xp is jnp:
        return jnp.zeros(at_KBT.shape[1:], bool).at[rows, at_KBT].set(True, mode="drop")
    teaches = xp.zeros((at_KBT.shape[1], length + 1), bool)
    teaches[rows, at_KBT] = True
    return teaches[:, :length]
