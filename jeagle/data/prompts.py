"""Prompts: the turns of a conversation up to where the target is to answer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jeagle.data.conversations import canonical, fitting_columns, reason
from jeagle.data.files import Record, expand, records
from jeagle.data.schema import messages_of, tools_of
from jeagle.data.starter import starter_prompts
from jeagle.errors import UserError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a jsonl or jsonl.gz file, as they stand."""
    return [record.row for record in records(path)]


def read_prompts(source: str) -> list[dict[str, Any]]:
    """Prompts as {"id", "category", "messages"[, "tools", "thinking"]}, each once.

    Args:
      source: `starter`, or a file of {"turns"}, {"messages"} or other rows of conversations. Of a conversation only
        the turns up to the first answer are taken, of a text the first half of its words.

    Raises:
      UserError: names the line that cannot be read.
    """
    if source == "starter":
        return [
            {"id": p.id, "category": p.category, "messages": [{"role": "user", "content": p.text}]}
            for p in starter_prompts()
        ]
    prompts = [_prompt(record) for path in expand(source) for record in records(path)]
    if not prompts:
        raise UserError(f'{source} holds no prompts: write {{"turns": ["..."]}} on each line.')
    return list({p["id"]: p for p in prompts}.values())


def prompt_of(messages: list[dict[str, Any]], category: str = "") -> dict[str, Any]:
    """{"id", "category", "messages"}: the id is of the messages."""
    digest = hashlib.sha256(canonical(messages)).hexdigest()[:12]
    return {"id": digest, "category": category, "messages": messages}


def _prompt(record: Record) -> dict[str, Any]:
    try:
        if record.reason:
            raise ValueError(record.reason)
        tree = record.row
        if isinstance(tree, dict) and "turns" in tree:
            messages = [{"role": "user", "content": tree["turns"][0]}]
        else:
            messages = messages_of(tree, fitting_columns(tree))
        tools = tools_of(tree)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f'{record.where} is no prompt ({reason(error)}): write {{"turns": ["..."]}}.') from error
    if messages[0]["role"] == "text":
        words = messages[0]["content"].split(" ")
        messages = [{"role": "text", "content": " ".join(words[: (len(words) + 1) // 2])}]
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    if first == 0:
        raise UserError(f"{record.where} begins with an answer: a prompt needs a user turn.")
    prompt = prompt_of(messages[:first], str(tree.get("category", "")))
    if tools:
        prompt["tools"] = tools
    return prompt | {name: tree[name] for name in ("thinking",) if isinstance(tree.get(name), bool)}
