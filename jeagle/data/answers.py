"""Whether the text between a generation prompt and an end token is the answer that it should be, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


class ConversationError(Exception):
    """A conversation that the template cannot render so that answers are found exactly; the text says why."""


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Whether an answer thinks aloud first: in a field of its own, or between tags in its text."""
    return bool(message.get("reasoning_content")) or CLOSE in message["content"]


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, str]:
    """(reasoning, the rest) of an answer, without the tags and the lines around them."""
    content, reasoning = message["content"], message.get("reasoning_content", "")
    if not reasoning and CLOSE in content:
        reasoning, content = content.split(CLOSE, 1)
        reasoning = reasoning.split(OPEN, 1)[-1]
    return reasoning.strip(), content.strip()


def without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message without what it thinks."""
    if message["role"] != "assistant" or not has_reasoning(message):
        return message
    kept = {name: value for name, value in message.items() if name != "reasoning_content"}
    return kept | {"content": split_reasoning(message | {"reasoning_content": ""})[1]}


def check_sampled(sampled: str, message: Mapping[str, Any], *, starts_special: bool) -> None:
    """ConversationError unless `sampled` is what the target would have said for `message`.

    That is its text exactly, up to the whitespace around it. What leads it must be its reasoning, or a header that
    begins with a special token, as where a channel is named: the target samples that too. An empty reasoning block
    that no target samples is neither. Tool calls take the template's form, but each must be there.

    Args:
      sampled: what stands between the generation prompt and the end token.
      starts_special: its first token is a special one.
    """
    text, calls = sampled.strip(), message.get("tool_calls", ())
    if text == message["content"].strip() and not calls and not message.get("reasoning_content"):
        return
    reasoning, content = split_reasoning(message)
    if missing := [call["function"]["name"] for call in calls if call["function"]["name"] not in text]:
        raise ConversationError(f"the template does not write tool calls ({missing[0]})")
    if reasoning and reasoning not in text:
        raise ConversationError("the template does not write the reasoning: --data.reasoning drop leaves it out")
    if content not in text or not (calls or text.endswith(content)):
        raise ConversationError("the template puts other text than the answer before the end token")
    lead = text[: len(text) - len(content)] if content and not calls else text
    if reasoning or calls or starts_special:
        return
    if lead.replace(OPEN, "").replace(CLOSE, "").strip() == "":
        raise ConversationError(
            "the template puts an empty reasoning block into the answer, which the target does not sample: "
            "--data.thinking off"
        )
    raise ConversationError("the template puts other text than the answer before the end token")
