"""Compares vLLM's counters with those of jeagle's decoding."""

from __future__ import annotations

from typing import Any

from tests.serve.reference import Counted, Reference


def differences(reference: Reference, answer: dict[str, Any]) -> list[str]:
    """Returns every difference between the engine's answer and the reference; empty where they are equal."""
    if "failed" in answer:
        return [f"vLLM could not serve it: {answer['failed']}"]
    found = []
    for i, expected in enumerate(reference.answers):
        for how in ("tokens", "tokens_together"):
            if answer[how][i] != expected:
                place = next((p for p, (a, b) in enumerate(zip(answer[how][i], expected, strict=False)) if a != b), 0)
                found.append(f"prompt {i}: the text differs from token {place} on")
        counted = Counted.of_json(answer["alone"][i])
        if counted != reference.counted(i):
            found.append(f"prompt {i}: vLLM {_line(counted)}, jeagle {_line(reference.counted(i))}")
    together = Counted.of_json(answer["together"])
    if together != reference.counted():
        found.append(f"all prompts: vLLM {_line(together)}, jeagle {_line(reference.counted())}")
    return found


def why_uninformative(counted: Counted) -> str:
    """Returns the reason why equal counters would prove nothing; empty where they are informative."""
    shares = [accepted / max(counted.drafts, 1) for accepted in counted.by_position]
    if sum(0.02 < share < 0.98 for share in shares) < 2:
        return f"accepted at {shares} of all positions: too rarely or too often for the counters to distinguish drafts"
    return ""


def _line(counted: Counted) -> str:
    return f"{counted.drafts} drafts, {counted.accepted} accepted {list(counted.by_position)}"
