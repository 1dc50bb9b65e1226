"""Texts and documents that are nearly the same are found, others are not, and variety is what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jeagle.data import describe_statistics, near_duplicates
from jeagle.data.near_duplicates import (
    SIMILARITY,
    NearDuplicateFilter,
    NearDuplicateIndex,
    document_signatures,
    estimated_jaccard,
    minhash,
    variety,
)
from tests.data.chats import tokenizer_for
from tests.data.test_preparation import make

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
        mine, theirs = minhash([one, other])
        off.append(float(estimated_jaccard(mine, theirs[None])[0]) - exact)
    assert abs(np.mean(off)) < 0.03 and np.max(np.abs(off)) < 0.2


def test_a_signature_does_not_depend_on_the_other_sequences():
    found = [RNG.integers(0, 99, length) for length in (0, 1, 4, 5, 6, 300, 2)]
    np.testing.assert_array_equal(minhash(found), np.concatenate([minhash([one]) for one in found]))
    assert len({row.tobytes() for row in minhash(found)}) == len(found)


def test_repetitions_and_near_duplicates_are_refused():
    distinct = NearDuplicateFilter()
    said = "Explain to a beginner how a bicycle stays upright while it is moving along a road."
    assert distinct.add(said)
    assert not distinct.add("  EXPLAIN to a beginner  " + said[22:]) and distinct.repeated == 1
    assert not distinct.add(said.replace("moving", "rolling")) and distinct.near == 1
    assert distinct.add("Explain to a beginner how a kite stays up in the wind above a beach.")
    assert distinct.add("如何在家里做面包?") and not distinct.add("如何在家里做面包?")
    assert distinct.add("a") and distinct.add("b") and not distinct.add("A ")
    assert (len(distinct.signatures), distinct.repeated, distinct.near) == (5, 3, 1)


def test_variety_of_texts_with_known_values():
    same = variety(["the cat sat on a mat"] * 4)
    assert same == {"distinct_1": 6 / 24, "distinct_2": 5 / 20, "distinct_3": 4 / 16, "nearest_mean": 1.0}
    letters = ["".join(chr(c) for c in RNG.integers(0x4E00, 0x9000, 50)) for _ in range(600)]
    apart = variety(letters)
    assert apart["nearest_mean"] < 0.05 and apart["distinct_1"] == 1.0
    assert variety([]) == {"distinct_1": 0, "distinct_2": 0, "distinct_3": 0, "nearest_mean": 0}


def add(found: NearDuplicateIndex, ids: np.ndarray, held_out: bool = False) -> bool:
    return found.add(document_signatures([ids])[0], held_out)


def test_near_duplicates_are_counted_overall_and_across_the_split():
    """Of 300 documents, every third has a copy with one token changed; every sixth's copy is held out."""
    found, planted = NearDuplicateIndex(), 0
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
    assert set(NearDuplicateIndex().count().values()) == {0}


@pytest.mark.parametrize("drop", [False, True])
def test_dropped_documents_are_not_compared_with_later_ones(drop):
    """Eight documents, each with 18 of 400 tokens changed in the next: 0.9 of windows are alike, after seven 0.44."""
    ids, found, said = RNG.integers(0, 9000, 400), NearDuplicateIndex(drop=drop), []
    for i in range(8):
        said.append(add(found, ids))
        ids = ids.copy()
        ids[50 * i : 50 * i + 18] += 1
    assert said[:2] == [False, True] and all(said[1:]) != drop and found.near == sum(said)


def test_documents_are_recognised_after_many_others():
    """The tables that they are found by are filled anew as they grow."""
    found, first = NearDuplicateIndex(), RNG.integers(0, 9000, (20, 60))
    assert not any(add(found, ids) for ids in first)
    for signature in RNG.integers(0, 1 << 16, (9000, 64)).astype(np.uint16):
        found.add(signature, False)
    assert all(add(found, ids) for ids in first)


def test_only_a_limited_number_of_documents_is_remembered(monkeypatch):
    monkeypatch.setattr(near_duplicates, "_REMEMBERED", 8)
    first, found = RNG.integers(0, 9000, 50), NearDuplicateIndex()
    add(found, first, True)
    assert add(found, first)
    for _ in range(8):
        assert not add(found, RNG.integers(0, 9000, 50))
    assert not add(found, first) and found.count()["near_held_out"] == found.near == 1


def test_documents_that_share_half_their_words_are_not_near_duplicates():
    found = NearDuplicateIndex()
    lead = RNG.integers(0, 9000, 200)
    for _ in range(200):  # a long question that all of them share
        add(found, np.concatenate([lead, RNG.integers(0, 9000, 200)]))
    assert SIMILARITY > 0.5 and found.count()["near_duplicates"] <= 4


# T9 too: what is measured stands, a word changed, among what is learnt.
def test_held_out_near_duplicates_of_training_conversations_give_a_warning(tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for i in range(200):
        words = random.choice(["the", "cat", "sat", "mat", "bird", "tree", "stone", "green"], 90).tolist()
        rows += [{"prompt": " ".join(words[:40]) + mark, "response": " ".join(words[40:])} for mark in ("", f" {i}")]
    statistics, _ = make(tmp_path, rows, tokenizer_for("chatml"), row_length=1024, held_out=0.2)
    assert 190 <= statistics["near_duplicates"] <= 210 and 40 <= statistics["near_held_out"] <= 90
    described = dict(statistics, coverage_train=1, coverage_held_out=1, draft_vocab=1, tokens_seen=1, ends_left_out=[])
    described["template_reads_date"] = False
    assert any("too optimistic" in line for line in describe_statistics(described, tmp_path))


def test_near_duplicates_are_dropped_and_a_shared_system_prompt_makes_none(tmp_path):
    """A conversation stays and its near copies go, whichever side of the split they are on; so that nothing leaks."""
    random, system = np.random.default_rng(0), {"role": "system", "content": "the old stone house near a tree " * 40}
    names, said = ["the", "cat", "sat", "mat", "bird", "tree", "stone", "green"], []
    for i in range(60):
        question, answer = (" ".join(random.choice(names, n)) for n in (40, 60))
        for mark in ("", " now", " then")[: 1 + i % 3]:
            turns = [{"role": "user", "content": question + mark}, {"role": "assistant", "content": answer}]
            said.append({"messages": [system, *turns]})
    settings = {"row_length": 1024, "held_out": 0.3}
    kept, _ = make(tmp_path, said, tokenizer_for("chatml"), **settings)
    assert kept["near_duplicates"] == 60 and kept["near_held_out"] > 10 and kept["conversations"] == 120
    statistics, folder = make(tmp_path, said, tokenizer_for("chatml"), near_duplicates="drop", **settings)
    assert statistics["near_dropped"] == 60 and statistics["near_held_out"] == 0 and statistics["conversations"] == 60
    prompts = [json.loads(line)["messages"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert len(prompts) == statistics["held_out"]["documents"] == 60 - statistics["train"]["documents"]
    assert all(not m[1]["content"].endswith((" now", " then")) for m in prompts)


def test_a_first_turn_that_also_occurs_in_the_system_prompt_makes_no_near_duplicates(tmp_path):
    random, system = np.random.default_rng(0), {"role": "system", "content": "this is the old stone house " * 40}
    rows = []
    for _ in range(30):
        answer = " ".join(random.choice(["the", "cat", "sat", "mat", "bird", "tree", "stone", "green"], 40))
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": [system, *turns]})
    assert make(tmp_path, rows, tokenizer_for("chatml"), row_length=1024)[0]["near_duplicates"] == 0
