"""The starter prompts: enough of them, fairly mixed, each whole, and the ones whose answers come with jeagle."""

from __future__ import annotations

import collections
import json
import os
import re
from pathlib import Path

import pytest

from jeagle.data import read_rows, starter_answers
from jeagle.data.starter import CATEGORIES, load_templates, starter_prompts

RUN = 8  # words in a row that would count as copied


def test_there_are_many_unique_prompts():
    prompts = starter_prompts()
    assert 2000 <= len(prompts) <= 3000
    assert len(_texts()) == len(set(_texts().values())) == len(prompts)


def test_the_categories_are_balanced():
    counts = collections.Counter(p["category"] for p in starter_prompts())
    assert set(counts) == set(CATEGORIES) and len(CATEGORIES) == 8
    assert max(counts.values()) <= 1.6 * min(counts.values()), counts


def test_any_first_part_mixes_the_categories():
    prompts = starter_prompts()
    assert [p["id"] for p in prompts] == sorted(p["id"] for p in prompts)
    assert set(collections.Counter(p["category"] for p in prompts[:200])) == set(CATEGORIES)


def test_the_prompts_are_deterministic():
    assert starter_prompts() == starter_prompts()


def test_texts_are_complete_and_short():
    for text in _texts().values():
        assert not re.search(r"\{\w+\}", text), text
        assert text == text.strip() and "  " not in text, text
        assert 3 <= len(text.split()) <= 60, text


@pytest.mark.parametrize("category", CATEGORIES)
def test_slots_and_templates_fit(category):
    templates, slots = load_templates(category)
    used = [re.findall(r"\{(\w+)\}", template) for template in templates]
    assert {name for names in used for name in names} == set(slots)
    assert len(set(templates)) == len(templates)
    for values in slots.values():
        assert len(set(values)) == len(values)
    for names in used:  # a slot named twice takes different values
        assert all(len(slots[name]) >= names.count(name) for name in names)


def test_shipped_answers_are_to_these_prompts():
    texts = _texts()
    for row in read_rows(starter_answers()):
        assert texts.get(row["id"]) == row["messages"][0]["content"]


@pytest.mark.skipif(not os.environ.get("JEAGLE_EVAL_PROMPTS"), reason="JEAGLE_EVAL_PROMPTS names no files")
def test_no_text_is_shared_with_evaluation_prompts():
    """JEAGLE_EVAL_PROMPTS: jsonl files with `turns`, separated as in PATH."""
    runs: set[tuple[str, ...]] = set()
    for path in os.environ["JEAGLE_EVAL_PROMPTS"].split(os.pathsep):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            for turn in json.loads(line)["turns"] if line.strip() else ():
                runs |= _runs(turn)
    assert runs
    shared = [text for text in _texts().values() if _runs(text) & runs]
    assert not shared, shared[:5]


def _texts() -> dict[str, str]:
    return {prompt["id"]: prompt["messages"][0]["content"] for prompt in starter_prompts()}


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
