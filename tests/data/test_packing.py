"""Packing loses nothing, doubles nothing, and mixes nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jeagle.data import Rendered, count_supervised, unpack
from tests.data.helpers import pack

documents = st.lists(
    st.lists(st.tuples(st.integers(1, 999), st.booleans()), min_size=1, max_size=24).map(
        lambda pairs: Rendered(np.array([a for a, _ in pairs], np.int32), np.array([b for _, b in pairs]))
    ),
    max_size=40,
)


def key(document: Rendered) -> tuple:
    return tuple(document.ids.tolist()), tuple(document.supervised.tolist())


@settings(max_examples=80, deadline=None)
@given(documents, st.integers(8, 32))
def test_unpacking_is_the_inverse_of_packing(found, row_length):
    packed = pack(found, row_length)
    cut = [Rendered(d.ids[:row_length], d.supervised[:row_length]) for d in found]
    kept = [d for d in cut if d.supervised.any()]
    assert sorted(map(key, unpack(packed.rows))) == sorted(map(key, kept))
    assert packed.packer.truncated == sum(len(d.ids) > row_length for d in found)
    assert packed.packer.unsupervised == len(cut) - len(kept)


@settings(max_examples=40, deadline=None)
@given(documents, st.integers(8, 32))
def test_every_answer_token_is_supervised_once(found, row_length):
    rows = pack(found, row_length).rows
    wanted = np.zeros(1000, np.int64)
    for document in found:
        ids, supervised = document.ids[:row_length], document.supervised[:row_length]
        np.add.at(wanted, ids[supervised], 1)
    np.testing.assert_array_equal(count_supervised(rows, 1000), wanted)


@settings(max_examples=40, deadline=None)
@given(documents)
def test_segments_rise_and_positions_restart(found):
    for tokens, segments, positions, supervised in zip(*pack(found, 32).rows, strict=True):
        real = segments > 0
        assert not tokens[~real].any() and not supervised[~real].any() and not positions[~real].any()
        assert not real[np.argmin(real) :].any() or real.all()
        steps = np.diff(segments[real])
        assert segments[0] == 1 and ((steps == 0) | (steps == 1)).all()
        for number in range(1, segments.max() + 1):
            np.testing.assert_array_equal(positions[segments == number], np.arange((segments == number).sum()))
