"""Decodes a trained run with jeagle: the texts, and how many tokens each verification accepted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jeagle import decoding
from jeagle.config import RunConfig, from_json
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec
from jeagle.run import acceptance, assemble

# Two float32 programs may choose different tokens where the best two logits are closer than this.
LEAST_GAP = 1e-4


@dataclasses.dataclass(frozen=True)
class Settings:
    """How both sides decode: greedily, ignoring end tokens."""

    draft_tokens: int = 4
    """Tokens drafted before each verification."""
    max_new_tokens: int = 48
    """Tokens of each answer."""
    max_prompts: int = 8
    """Number of held-out prompts."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """vLLM's counters: verifications that had drafts, tokens drafted, accepted, and accepted at each position."""

    drafts: int
    drafted: int
    accepted: int
    by_position: tuple[int, ...]

    @classmethod
    def of_rounds(cls, rounds: Sequence[int], draft_tokens: int) -> Counted:
        """rounds: for each verification, how many drafted tokens were accepted."""
        by_position = tuple(sum(r > place for r in rounds) for place in range(draft_tokens))
        return cls(len(rounds), len(rounds) * draft_tokens, sum(rounds), by_position)

    @classmethod
    def of_json(cls, tree: dict[str, Any]) -> Counted:
        counts = {name: int(tree[name]) for name in ("drafts", "drafted", "accepted")}
        return cls(**counts, by_position=tuple(map(int, tree["by_position"])))


@dataclasses.dataclass(frozen=True)
class Reference:
    """jeagle's decoding of a run's prompts, in float32.

    Attributes:
      prompts, answers: token ids.
      rounds: for each answer, how many drafted tokens each verification accepted.
      least_gap: between the best two of the target's logits, over all answers.
    """

    settings: Settings
    prompts: list[list[int]]
    answers: list[list[int]]
    rounds: list[list[int]]
    least_gap: float

    def counted(self, prompt: int | None = None) -> Counted:
        """Returns the counters of one prompt, or of all."""
        rounds = [r for each in self.rounds for r in each] if prompt is None else self.rounds[prompt]
        return Counted.of_rounds(rounds, self.settings.draft_tokens)

    def job(self, target: Path, draft: Path) -> dict[str, Any]:
        """Returns a job for `in_vllm`."""
        longest = max(map(len, self.prompts))
        room = longest + self.settings.max_new_tokens + 2 * self.settings.draft_tokens
        return {
            "target": str(target),
            "draft": str(draft),
            "draft_tokens": self.settings.draft_tokens,
            "max_new_tokens": self.settings.max_new_tokens,
            "max_model_len": room,
            "prompts": self.prompts,
        }


def open_run(run: Path) -> tuple[RunConfig, DraftSpec, acceptance.Bench]:
    """Opens a run's last checkpoint and its target, both in float32, with the target's weights as they are stored.

    Raises:
      UserError: for a run without a checkpoint.
    """
    config = from_json(json.loads((run / "config.json").read_text()))
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, weights="dtype"))
    _, spec, params = assemble.load_draft(run, "last")
    return config, spec, acceptance.open_bench(config, spec, run, params)


def decode(run: Path, settings: Settings) -> Reference:
    """Decodes held-out prompts of the run with its last checkpoint, as `jeagle.bench` does.

    Prompts are left out where the target's best two tokens nearly tie somewhere in the answer.

    Raises:
      UserError: for a run without a checkpoint, or without held-out prompts.
    """
    config, _, opened = open_run(run)
    prompts = acceptance.prompt_ids(opened, config, run, None, settings.max_prompts)
    endless = opened._replace(loaded=opened.loaded._replace(end_token_ids=()))
    report, decoded = acceptance.measure(
        endless,
        prompts,
        how=decoding.Decoding(decoding.TreeShape(settings.draft_tokens)),
        max_new_tokens=settings.max_new_tokens,
        batch=settings.max_prompts,
    )
    if report["different"]:
        raise UserError(f"{run}: jeagle's own speculative and plain decoding differ in {report['different']} prompts.")
    gaps = [float(plain.gaps[: settings.max_new_tokens].min()) for plain in decoded.plain]
    clear = [i for i, gap in enumerate(gaps) if gap > LEAST_GAP]
    if not clear:
        raise UserError(f"{run}: in every prompt's answer the best two tokens nearly tie; use more prompts.")
    return Reference(
        settings,
        prompts=[prompts[i].tolist() for i in clear],
        answers=[decoded.speculative[i].tokens for i in clear],
        rounds=[decoded.speculative[i].rounds for i in clear],
        least_gap=min(gaps[i] for i in clear),
    )
