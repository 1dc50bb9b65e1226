"""The n-gram table, the counters, and the rule that excuses ties, on texts that a person can check."""

from __future__ import annotations

import numpy as np
import pytest

from jeagle.decoding import (
    FirstThatDrafts,
    NGramTable,
    PlainAnswer,
    PromptLookup,
    SpeculativeAnswer,
    TreeShape,
    acceptance_counters,
    compare_answers,
    decode_without_draft_model,
)


def table(*documents: tuple[list[int], list[int]]) -> NGramTable:
    return NGramTable((np.array(ids), np.array(supervised, bool)) for ids, supervised in documents)


def test_the_most_frequent_follower_is_drafted():
    counted = table(([1, 2, 3, 1, 2, 4, 1, 2, 4], [1] * 9))
    assert counted.draft([1, 2], 1) == [4]
    assert counted.draft([1, 2], 4) == [4, 1, 2, 4]


def test_ties_go_to_the_lower_id():
    assert table(([7, 5, 7, 3], [1] * 4)).draft([7], 1) == [3]
    assert table(([7, 3, 7, 5], [1] * 4)).draft([7], 1) == [3]


def test_a_pair_wins_over_its_last_token_which_serves_where_the_pair_never_occurred():
    counted = table(([1, 2, 9], [1] * 3), ([5, 2, 8, 6, 2, 8], [1] * 6))
    assert counted.draft([1, 2], 1) == [9]  # after 2 alone, 8 is more frequent
    assert counted.draft([4, 2], 1) == [8]


def test_only_supervised_tokens_follow_and_an_unknown_token_ends_the_draft():
    counted = table(([1, 2, 3, 4], [0, 0, 1, 0]))
    assert counted.draft([1, 2], 5) == [3]  # 4 is not supervised, so nothing follows 3
    assert counted.draft([0, 1], 5) == []


def test_no_context_reaches_into_another_document():
    counted = table(([1, 2], [1, 1]), ([3, 4], [1, 1]))
    assert counted.draft([1, 2], 3) == []  # 3 begins a document of its own


def test_decoding_a_known_text_counts_what_the_table_gets_right():
    """The prompt's prefill gives the answer's first token; each round then commits the right drafts and one more."""
    counted = table(([1, 2, 3, 4, 5], [1] * 5))
    answer = decode_without_draft_model(
        counted, np.array([9, 1]), np.array([2, 3, 4, 7, 5, 1, 2, 3]), answer=5, draft_tokens=3
    )
    assert answer.tokens == [2, 3, 4, 7, 5]
    assert answer.rounds == [2, 0]  # 3 4 of 3 4 5 and the target's 7; then nothing follows 7, and the target's 5
    whole = decode_without_draft_model(
        counted, np.array([9, 1]), np.array([2, 3, 4, 5, 6, 6, 6, 6]), answer=4, draft_tokens=3
    )
    assert whole.rounds == [3]


@pytest.mark.parametrize(
    ("context", "drafted"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),
        ([5, 3, 8, 4, 3, 7, 6, 3], [7, 6, 3]),  # the latest of two occurrences
        ([4, 3, 8, 9, 3, 7, 4, 3], [8, 9, 3]),  # a longer match wins over a later one
        ([1, 2, 3], []),
        ([6], []),
    ],
)
def test_prompt_lookup_drafts_what_followed_the_longest_latest_match(context, drafted):
    assert PromptLookup().draft(context, 3) == drafted


def test_the_first_drafter_with_a_proposal_drafts():
    both = FirstThatDrafts(PromptLookup(), table(([3, 4], [1, 1])))
    assert both.draft([3, 5, 3], 2) == [5, 3]
    assert both.draft([1, 3], 2) == [4]


def test_counters_are_vllms():
    """By hand: five rounds of three drafted tokens, 3 + 0 + 1 + 2 + 0 = 6 accepted."""
    answers = [SpeculativeAnswer([1] * 9, [3, 0, 1]), SpeculativeAnswer([1] * 4, [2, 0])]
    assert acceptance_counters(answers, TreeShape(3)) == {
        "drafts": 5,
        "drafted_tokens": 15,
        "accepted_tokens": 6,
        "acceptance_by_position": [0.6, 0.4, 0.2],
        "acceptance_length": 2.2,
    }


def test_counters_without_a_round():
    counters = acceptance_counters([SpeculativeAnswer([2], [])], TreeShape(2))
    assert counters["acceptance_length"] == 1.0 and counters["acceptance_by_position"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("speculative", "gaps", "equal", "excused"),
    [
        ([1, 2, 3], [1.0, 1.0, 1.0, 1.0], True, False),
        ([1, 2], [1.0, 0.0, 1.0, 1.0], True, False),  # a tie without a difference; the greedy text continues
        ([1, 5, 3], [1.0, 5e-5, 1.0, 1.0], False, True),
        ([1, 5, 3], [1.0, 2e-4, 1.0, 1.0], False, False),
        ([1, 5, 6], [1.0, 5e-5, 1.0, 1.0], False, True),  # what follows an excused difference is another text
        ([1, 5, 3], [5e-5, 1.0, 5e-5, 5e-5], False, False),  # a tie elsewhere excuses nothing
    ],
)
def test_a_difference_is_excused_where_greedy_decoding_ties(speculative, gaps, equal, excused):
    greedy = PlainAnswer(np.array([1, 2, 3, 4]), np.array(gaps, np.float32))
    assert compare_answers(SpeculativeAnswer(speculative, []), greedy) == (equal, excused)
