"""Exact sets of counting slots, on a row that a person can check."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import align
from jeagle.interfaces import Batch

# One document p p A A A A, then p A A, then padding.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])
SUPERVISED = np.array([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0]], bool)
ROW = Batch(np.arange(12)[None] + 1, SEGMENTS, np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0]]), SUPERVISED)

EXPECTED = {
    "served": [[1, 2, 3, 6], [1, 2], [1]],
    "predicted": [[0, 1, 2, 3, 6], [0, 1, 2], [0, 1]],
    "specforge": [[2, 3, 4, 7], [1, 2, 3, 6], [0, 1, 2]],
    "speculators": [[1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 6], [0, 1, 2]],
}


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("rule", align.SLOT_RULES)
def test_counting_slots(rule, xp):
    counts = np.asarray(align.counting_slots(ROW, 3, rule, xp=xp))
    assert [np.flatnonzero(c[0]).tolist() for c in counts] == EXPECTED[rule]


def test_reads_cross_documents_only_when_asked():
    reads = align.read_positions(SEGMENTS, 2, xp=np)
    assert reads[1][0].tolist() == [2, 3, 4, 5, 12, 12, 8, 12, 12, 12, 12, 12]
    crossing = align.read_positions(SEGMENTS, 2, cross_documents=True, xp=np)
    assert crossing[0][0].tolist() == [1, 2, 3, 4, 5, 12, 7, 8, 12, 12, 12, 12]
    # From the first document's last token (5) to the second's second (7).
    assert crossing[1][0].tolist() == [2, 3, 4, 5, 7, 12, 8, 12, 12, 12, 12, 12]


def test_select_keeps_order_and_marks_the_rest():
    wanted = jnp.asarray([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
    chosen = align.select(wanted, 3)
    assert chosen.positions_BN.tolist() == [[0, 1, 3], [0, 1, 4]]
    assert chosen.live_BN.tolist() == [[False, True, True], [False, False, True]]
