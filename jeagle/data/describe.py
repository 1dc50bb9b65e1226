"""What prepared data holds, in lines for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ENOUGH_COVERAGE = 0.95  # of the answers' tokens by the draft's vocabulary
MANY_CUT = 0.05  # share of answers that may be cut short without a remark
MANY_LEAKED = 0.05  # share of held-out conversations that may have a near copy to train on
ENOUGH_ON_POLICY = 0.9  # share of answers that the target itself should have written


def describe(statistics: dict[str, Any], data: Path) -> list[str]:
    """A few lines: what there is, then what to know about it, then what to change."""
    s = statistics
    train, held_out = s["train"], s["held_out"]
    share = train["supervised_tokens"] / max(train["tokens"], 1)
    lines = [
        *(f"read {columns}" for columns in s["columns"]),
        f"data: {train['documents']} conversations in {train['rows']} rows ({train['fill']:.0%} full), "
        f"{train['tokens']:,} tokens, {share:.0%} of them answers; {held_out['documents']} held out",
        f"draft vocabulary: {s['draft_vocab']} tokens cover {s['coverage_train']:.1%} of the answers"
        + (f", {s['coverage_held_out']:.1%} of held-out ones" if held_out["documents"] else ""),
    ]
    return lines + [f"note: {text}" for text in _notes(s)] + _aside(s, data) + [f"warning: {t}" for t in _warnings(s)]


def _notes(s: dict[str, Any]) -> list[str]:
    near, dropped = s.get("near_duplicates", 0), s.get("near_dropped", 0)
    long = {name: s["train"][name] + s["held_out"][name] for name in ("truncated", "split", "dropped", "unsupervised")}
    notes = {
        f"{s['duplicates']} duplicates are left out": s["duplicates"],
        f"{near} conversations are nearly the same as an earlier one, and "
        + ("left out" if dropped else "kept: --data.near-duplicates drop leaves them out"): near,
        f"{long['truncated']} conversations were cut to the row length: --data.row-length sets it, --data.long split "
        "keeps all of them": long["truncated"],
        f"{long['split']} conversations were longer than a row and go on in further documents": long["split"],
        f"{long['dropped']} conversations were longer than a row and are left out": long["dropped"],
        f"{long['unsupervised']} conversations have no answer within the row length and are left out": long[
            "unsupervised"
        ],
        f"{s['answers_cut_short']} answers are cut short: their end is not learnt": s["answers_cut_short"],
        f"the template rewrites earlier turns: {s['taken_apart']} conversations became one document for each answer, "
        "as a server sees them": s["taken_apart"],
        "the template writes today's date: give it one with --data.template-arguments to make the same rows again": s[
            "template_reads_date"
        ],
    }
    return [text for text, count in notes.items() if count] + [f"{text} ({n} x)" for text, n in s["notes"].items()]


def _aside(s: dict[str, Any], data: Path) -> list[str]:
    if not s["set_aside"]:
        return []
    reasons = "; ".join(f"{n} x {reason}" for reason, n in s["set_aside"].items())
    return [f"set aside: {reasons}; each with its place in {data / 'set_aside.jsonl'}"]


def _warnings(s: dict[str, Any]) -> list[str]:
    used, cut = s["conversations"], s["answers_cut_short"]
    found = []
    if s["coverage_train"] < ENOUGH_COVERAGE:
        lost = round((1 - s["coverage_train"]) * s["train"]["supervised_tokens"])
        found.append(
            f"the draft cannot say {1 - s['coverage_train']:.1%} of the answers ({lost:,} tokens): raise --draft.vocab "
            f"from {s['draft_vocab']}; {s['tokens_seen']:,} different tokens are said"
        )
    if s["ends_left_out"]:
        ids = ", ".join(map(str, s["ends_left_out"]))
        found.append(f"the given vocabulary lacks the end tokens {ids}: the draft cannot say them")
    if cut > MANY_CUT * used and s["known_model"] and s["on_policy"] < used:
        found.append(f"{cut / used:.0%} of the answers are cut short: answer with a higher token limit")
    leaked = s.get("near_held_out", 0)
    if leaked > MANY_LEAKED * max(s["held_out"]["documents"], 1):
        found.append(
            f"{leaked} of {s['held_out']['documents']} held-out conversations are nearly the same as one to train on: "
            "what is measured on them flatters the draft"
        )
    if s["on_policy"] < ENOUGH_ON_POLICY * used:
        found.append(
            f"{s['on_policy'] / max(used, 1):.0%} of the answers are known to be this target's own: a draft learns "
            "best from those; python -m jeagle.regenerate makes them"
        )
    return found
