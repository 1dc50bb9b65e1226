"""Prompts and on-policy answers that come with jeagle.

The starter prompts are short, varied user turns in the eight MT-bench categories, written for jeagle (Apache-2.0).
They are stored as templates with slots in templates/*.json and are expanded deterministically.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
PER_TEMPLATE = 7


def starter_prompts() -> list[dict[str, Any]]:
    """Returns all starter prompts without duplicates, sorted by id, so that any first part mixes the categories.

    Returns:
      {"id", "category", "messages"}, with one user turn; the id is the first 12 hex digits of its text's sha256.
    """
    prompts: dict[str, dict[str, Any]] = {}
    for category in CATEGORIES:
        for text in _expand(category):
            number, turn = _digest(text)[:12], {"role": "user", "content": text}
            prompts.setdefault(number, {"id": number, "category": category, "messages": [turn]})
    return [prompts[number] for number in sorted(prompts)]


def load_templates(category: str) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the templates of a category, and the values of each slot."""
    tree = json.loads((resources.files(__package__) / "templates" / f"{category}.json").read_text(encoding="utf-8"))
    return tree["templates"], tree["slots"]


def _expand(category: str) -> Iterator[str]:
    templates, slots = load_templates(category)
    for template in templates:
        seen: set[str] = set()
        # There are twice as many draws as texts are wanted, because small slots repeat themselves.
        for draw in range(2 * PER_TEMPLATE):
            text = _fill(template, slots, draw)
            if text not in seen and len(seen) < PER_TEMPLATE:
                seen.add(text)
                yield text


def _fill(template: str, slots: dict[str, list[str]], draw: int) -> str:
    used: list[str] = []

    def value(match: re.Match) -> str:
        free = [v for v in slots[match.group(1)] if v not in used]
        number = int(_digest(f"{template}|{draw}|{match.start()}"), 16)
        used.append(free[number % len(free)])
        return used[-1]

    text = re.sub(r"\{(\w+)\}", value, template)
    # A value at the beginning of the prompt is capitalised; a template in lower case is casual on purpose.
    return text[0].upper() + text[1:] if template.startswith("{") else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
