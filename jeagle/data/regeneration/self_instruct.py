"""Lets the target write the prompts itself, if there is no data at all.

As in Self-Instruct (Wang et al. 2022, arXiv 2212.10560), the target is shown some prompts, here from the starter
prompts, and is asked for another one. Each request follows from the seed and its number alone, so that the result does
not depend on the order, on the batch size or on where a run was interrupted.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from jeagle.data.chat.form import split_reasoning
from jeagle.data.near_duplicates import NearDuplicateFilter
from jeagle.data.regeneration.prompts import make_prompt
from jeagle.data.starter import starter_prompts

_SHOWN = 3  # starter prompts in a request
_LONGEST = 4000  # characters of a prompt
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


class WrittenPrompts(NamedTuple):
    """Prompts that a target wrote.

    Attributes:
      prompts: in the form of `read_prompts`, without near-duplicates.
      unusable: number of replies that have no words, were cut off or are too long.
      repeated, near: number of prompts that were dropped as exact repetitions and as near-duplicates.
    """

    prompts: list[dict[str, Any]]
    unusable: int
    repeated: int
    near: int


def prompt_requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns the first `count` requests for a prompt, in the form of prompts and in order of their ids."""
    texts: dict[str, list[str]] = {}
    for prompt in starter_prompts():
        texts.setdefault(prompt["category"], []).append(prompt["messages"][0]["content"])
    categories, requests = sorted(texts), []
    for number in range(count):
        generator = random.Random(f"{seed} {number}")
        category = categories[number % len(categories)]
        shown = "\n".join(f"- {text}" for text in generator.sample(texts[category], _SHOWN))
        text = (
            f"People sent these messages to an assistant:\n\n{shown}\n\nWrite another message that someone may send "
            f"it, of the same kind, but about {generator.choice(_SUBJECTS)}, {generator.choice(_MANNERS)}. Do not "
            "answer it. Reply with the message alone."
        )
        messages = [{"role": "user", "content": text}]
        requests.append({"id": f"{seed}-{number:08}", "category": category, "messages": messages, "thinking": False})
    return requests


def collect_prompts(rows: Sequence[dict[str, Any]], count: int) -> WrittenPrompts:
    """Collects the first `count` usable prompts from answered requests.

    Args:
      rows: answered `prompt_requests`, in order.
      count: prompts that are wanted; a prompt is dropped if it is a near-duplicate of an earlier one or of a starter
        prompt.
    """
    distinct, prompts, unusable = NearDuplicateFilter(), [], 0
    for prompt in starter_prompts():
        distinct.add(prompt["messages"][0]["content"])
    distinct.repeated = distinct.near = 0
    for row in rows:
        text = "" if row["finish_reason"] == "length" else _written_prompt(row["messages"][-1])
        if not text:
            unusable += 1
        elif distinct.add(text):
            prompts.append(make_prompt([{"role": "user", "content": text}], row["category"]))
            if len(prompts) == count:
                break
    return WrittenPrompts(prompts, unusable, distinct.repeated, distinct.near)


def _written_prompt(reply: dict[str, Any]) -> str:
    """Returns the prompt in a reply without reasoning and quotation marks; an empty text if it is not usable."""
    content = reply.get("content") or ""
    _, text = split_reasoning(content) or ("", content.strip())
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if len(text) <= _LONGEST and any(map(str.isalnum, text)) else ""
