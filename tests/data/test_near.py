"""Texts and documents that are nearly the same are found, others are not, and variety is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from jeagle.data import near
from jeagle.data.near import (
    NEARLY,
    Distinct,
    NearDocuments,
    document_signatures,
    likeness,
    signatures,
    text_signature,
    variety,
)

RNG = np.random.default_rng(0)


def windows(ids) -> set:
    return {tuple(ids[i : i + 5]) for i in range(len(ids) - 4)}


@pytest.mark.parametrize("changed", [0, 2, 10, 40, 300])
def test_the_estimate_is_near_the_share_of_windows(changed):
    """Mean over 40 pairs: an estimate of 128 hashes is off by at most 0.05 * sqrt(128 / 128) each, evenly."""
    off = []
    for _ in range(40):
        one = RNG.integers(0, 5000, 300)
        other = one.copy()
        other[RNG.choice(300, changed, replace=False)] = RNG.integers(5000, 9000, changed)
        exact = len(windows(one) & windows(other)) / len(windows(one) | windows(other))
        mine, theirs = signatures([one, other])
        off.append(float(likeness(mine, theirs[None])[0]) - exact)
    assert abs(np.mean(off)) < 0.03 and np.max(np.abs(off)) < 0.2


def test_a_signature_does_not_depend_on_what_it_is_made_with():
    found = [RNG.integers(0, 99, length) for length in (0, 1, 4, 5, 6, 300, 2)]
    np.testing.assert_array_equal(signatures(found), np.concatenate([signatures([one]) for one in found]))
    assert len({row.tobytes() for row in signatures(found)}) == len(found)


def test_repeated_and_nearly_repeated_texts_are_held_back():
    distinct = Distinct()
    said = "Explain to a beginner how a bicycle stays upright while it is moving along a road."
    assert distinct.add(said)
    assert not distinct.add("  EXPLAIN to a beginner  " + said[22:]) and distinct.repeated == 1
    assert not distinct.add(said.replace("moving", "rolling")) and distinct.near == 1
    assert distinct.add("Explain to a beginner how a kite stays up in the wind above a beach.")
    assert distinct.add("如何在家里做面包?") and not distinct.add("如何在家里做面包?")
    assert distinct.add("a") and distinct.add("b") and not distinct.add("A ")
    assert (len(distinct.signatures), distinct.repeated, distinct.near) == (5, 3, 1)


def test_variety_of_texts_that_are_known():
    same = variety(["the cat sat on a mat"] * 4)
    assert same == {"distinct_1": 6 / 24, "distinct_2": 5 / 20, "distinct_3": 4 / 16, "nearest_mean": 1.0}
    letters = ["".join(chr(c) for c in RNG.integers(0x4E00, 0x9000, 50)) for _ in range(600)]
    apart = variety(letters, [text_signature(t) for t in letters])
    assert apart["nearest_mean"] < 0.05 and apart["distinct_1"] == 1.0
    assert variety([]) == {"distinct_1": 0, "distinct_2": 0, "distinct_3": 0, "nearest_mean": 0}


def add(found: NearDocuments, ids: np.ndarray, held_out: bool = False) -> bool:
    return found.add(document_signatures([ids])[0], held_out)


def test_near_documents_are_counted_and_those_across_the_split():
    """Of 300 documents, every third has a copy with one token changed; every sixth's copy is held out."""
    found, planted = NearDocuments(), 0
    for i in range(300):
        ids = RNG.integers(0, 9000, 400)
        add(found, ids)
        if i % 3 == 0:
            planted += 1
            ids[200] += 1
            add(found, ids, i % 6 == 0)
    counts = found.count()
    assert planted * 0.98 <= counts["near_duplicates"] <= planted
    assert planted / 2 * 0.96 <= counts["near_held_out"] <= planted / 2
    assert set(NearDocuments().count().values()) == {0}


@pytest.mark.parametrize("drop", [False, True])
def test_what_is_left_out_is_compared_with_no_more(drop):
    """Eight documents, each with 18 of 400 tokens changed in the next: 0.9 of windows are alike, after seven 0.44."""
    ids, found, said = RNG.integers(0, 9000, 400), NearDocuments(drop=drop), []
    for i in range(8):
        said.append(add(found, ids))
        ids = ids.copy()
        ids[50 * i : 50 * i + 18] += 1
    assert said[:2] == [False, True] and all(said[1:]) != drop and found.near == sum(said)


def test_documents_are_found_again_however_many_came_between():
    """The tables that they are found by are filled anew as they grow."""
    found, first = NearDocuments(), RNG.integers(0, 9000, (20, 60))
    assert not any(add(found, ids) for ids in first)
    for signature in RNG.integers(0, 1 << 16, (9000, 64)).astype(np.uint16):
        found.add(signature, False)
    assert all(add(found, ids) for ids in first)


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(near, "_REMEMBERED", 8)
    first, found = RNG.integers(0, 9000, 50), NearDocuments()
    add(found, first, True)
    assert add(found, first)
    for _ in range(8):
        assert not add(found, RNG.integers(0, 9000, 50))
    assert not add(found, first) and found.count()["near_held_out"] == found.near == 1


def test_documents_of_half_the_same_words_are_no_duplicates():
    found = NearDocuments()
    lead = RNG.integers(0, 9000, 200)
    for _ in range(200):  # a long question that all of them share
        add(found, np.concatenate([lead, RNG.integers(0, 9000, 200)]))
    assert NEARLY > 0.5 and found.count()["near_duplicates"] <= 4
