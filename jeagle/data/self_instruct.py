"""Prompts that the target writes itself, where there is no data at all.

As in Self-Instruct (Wang et al. 2022, arXiv 2212.10560) it is shown some prompts, here of the starter ones, and asked
for another. Each request follows from (seed, its number) alone, so that what was written does not depend on the order,
the batch or where a run was stopped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jeagle.data.answers import split_reasoning
from jeagle.data.near_duplicates import Distinct
from jeagle.data.prompts import prompt_of
from jeagle.data.starter import starter_prompts

_SHOWN = 3
_LONGEST = 4000  # characters
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»", "`": "`"}
_SUBJECTS = (
    *("cooking", "gardening", "astronomy", "football", "law", "medicine", "history", "music", "trains", "poetry"),
    *("chess", "banking", "chemistry", "sailing", "painting", "grammar", "animals", "weather", "school", "marketing"),
    *("databases", "web pages", "algorithms", "shell scripts", "games", "robots", "statistics", "geometry", "puzzles"),
    *("philosophy", "religion", "architecture", "fashion", "travel", "mountains", "the sea", "cities", "farming"),
    *("friendship", "family", "work", "emails", "job interviews", "speeches", "stories", "films", "theatre", "dance"),
    *("biology", "genetics", "energy", "climate", "electricity", "optics", "metals", "paper", "cars", "bicycles"),
    *("taxes", "insurance", "shopping", "health", "sleep", "sport", "psychology", "economics", "politics", "news"),
    *("translation", "spelling", "tables of figures", "lists", "dates and times", "maps", "security", "privacy"),
)
_MANNERS = (
    "in one short sentence",
    "in two or three sentences, with the facts that an answer needs",
    "as someone who knows the subject well",
    "as a beginner",
    "as one writes in a chat",
    "with a text, a list or some figures in it that the answer has to use",
)


class Turns(NamedTuple):
    """User turns that a target wrote.

    Attributes:
      prompts: as `read_prompts` gives them, each unlike the others. signatures: MinHash of each.
      unusable: without words, cut off or too long. repeated, near: left out since they are there already, or nearly.
    """

    prompts: list[dict[str, Any]]
    signatures: list[np.ndarray]
    unusable: int
    repeated: int
    near: int


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` requests for a user turn, as prompts, in order of their ids."""
    kinds: dict[str, list[str]] = {}
    for prompt in starter_prompts():
        kinds.setdefault(prompt.category, []).append(prompt.text)
    names, found = sorted(kinds), []
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        category = names[number % len(names)]
        shown = "\n".join(f"- {text}" for text in chance.sample(kinds[category], _SHOWN))
        text = (
            f"People sent these messages to an assistant:\n\n{shown}\n\nWrite another message that someone may send "
            f"it, of the same kind, but about {chance.choice(_SUBJECTS)}, {chance.choice(_MANNERS)}. Do not answer it. "
            "Reply with the message alone."
        )
        messages = [{"role": "user", "content": text}]
        found.append({"id": f"{seed}-{number:08}", "category": category, "messages": messages, "thinking": False})
    return found


def turns_of(rows: Sequence[dict[str, Any]], count: int) -> Turns:
    """The first `count` usable turns of answered `requests`, given in order, none like another or a starter prompt."""
    distinct, prompts, unusable = Distinct(), [], 0
    for prompt in starter_prompts():
        distinct.add(prompt.text)
    known = len(distinct.signatures)
    distinct.repeated = distinct.near = 0
    for row in rows:
        text = "" if row["finish_reason"] == "length" else _turn(row["messages"][-1])
        if not text:
            unusable += 1
        elif distinct.add(text):
            prompts.append(prompt_of([{"role": "user", "content": text}], row["category"]))
            if len(prompts) == count:
                break
    return Turns(prompts, distinct.signatures[known:], unusable, distinct.repeated, distinct.near)


def _turn(reply: dict[str, Any]) -> str:
    """The message that a reply holds, without what was thought before it and quotation marks around it."""
    text = split_reasoning({"content": reply.get("content") or ""})[1]
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if len(text) <= _LONGEST and any(map(str.isalnum, text)) else ""
