"""Which reading of a published draft is right: each decodes a few prompts, and the most accepted one is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle import decoding
from jeagle.config import RunConfig
from jeagle.exchange import Reading
from jeagle.exporting.run_reader import MEASURED_FILE
from jeagle.interfaces import DraftSpec
from jeagle.run import acceptance, assemble
from jeagle.run.draft_init import EMBEDDING_FILE
from jeagle.runtime.progress import Progress
from jeagle.targets import is_target_embedding

_CLEAR = 2.0  # standard errors between the best reading and the next
_HARDLY = 1.1  # acceptance length that a draft of another target, or a wrongly read one, stays under


class Decoding(NamedTuple):
    """What each reading decodes. `prompts` is a file, or None for the run's own."""

    prompts: Path | None
    max_prompts: int
    max_new_tokens: int
    draft_tokens: int


class Measured(NamedTuple):
    """A reading, and what was accepted with it.

    Attributes:
      rounds: of each prompt, how many drafted tokens each verification accepted.
    """

    reading: Reading
    rounds: list[list[int]]
    counters: dict[str, Any]


def settle(
    config: RunConfig,
    how: Decoding,
    folder: Path,
    readings: Sequence[Reading],
    params: dict[str, np.ndarray],
    *,
    step: int,
) -> tuple[DraftSpec, list[str]]:
    """The reading whose draft is accepted most, and the table of all of them; its figures go into the run's folder.

    Args:
      folder: of the run, where its tables lie and draft.json says what it is made from.
    """
    loaded = assemble.load_target(config, assemble.mesh_of(config), dtype="float32")
    measured = []
    with Progress(len(readings), "readings", "measure") as progress:
        for number, reading in enumerate(readings, 1):
            measured.append(_measure(config, how, folder, reading, params, loaded))
            progress.update(number)
    ordered = sorted(measured, key=lambda m: -m.counters["acceptance_length"])
    best = ordered[0]
    told = best.counters | {"prompts_measured": len(best.rounds), "draft_tokens": how.draft_tokens}
    told |= {"step": step, "max_new_tokens": how.max_new_tokens, "dtype": "float32", "temperature": 0}
    (folder / MEASURED_FILE).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    return best.reading.spec, [
        *_table(measured),
        *_verdict(ordered),
        *_embedding_note(folder, best.reading.spec, loaded),
    ]


def _measure(
    config: RunConfig, how: Decoding, folder: Path, reading: Reading, params: dict[str, np.ndarray], loaded: Any
) -> Measured:
    opened = acceptance.open_bench(config, reading.spec, folder, params, loaded=loaded)
    prompts = acceptance.prompt_ids(opened, config, folder, how.prompts, how.max_prompts)
    decoded = decoding.decode(
        opened.models,
        opened.weights,
        prompts,
        draft_tokens=how.draft_tokens,
        max_new_tokens=how.max_new_tokens,
        end_token_ids=loaded.end_token_ids,
        batch=min(len(prompts), 16),
    )
    return Measured(reading, [list(m.rounds) for m in decoded], decoding.counters(decoded, how.draft_tokens))


def _table(measured: list[Measured]) -> list[str]:
    labels = [label(m.reading) for m in measured]
    width = max(len(text) for text in [*labels, "reading"])
    lines = [f"{'reading':<{width}}  acceptance length  by position"]
    for text, m in zip(labels, measured, strict=True):
        by_position = " ".join(f"{share:.3f}" for share in m.counters["acceptance_by_position"])
        lines.append(f"{text:<{width}}  {m.counters['acceptance_length']:<17.3f}  {by_position}")
    return lines


def label(reading: Reading) -> str:
    """A reading's answers in words."""
    words = {
        "aux_layers": lambda aux_layers: f"aux layers {' '.join(map(str, aux_layers))}",
        "norm_output": lambda means: f"norm_output {means}",
        "norm_before_residual": lambda holds: f"norm_before_residual {str(holds).lower()}",
    }
    return ", ".join(words[name](value) for name, value in reading.answers.items()) or "as its files say"


def _verdict(ordered: list[Measured]) -> list[str]:
    """What the figures say, and how surely."""
    best = ordered[0]
    lines = []
    if best.counters["acceptance_length"] < _HARDLY:
        lines.append("warning: hardly anything is accepted in any reading: is this the target that it was trained for?")
    if len(ordered) == 1:
        return lines
    lead = surely_ahead(best.rounds, ordered[1].rounds)
    if lead >= _CLEAR:
        return [*lines, f"taken: {label(best.reading)}"]
    return [
        *lines,
        f"taken: {label(best.reading)}, but no reading clearly wins: it is {lead:.1f} standard errors ahead of "
        f"{label(ordered[1].reading)}. More prompts (--max-prompts) tell more, or say it yourself: "
        f"{options(best.reading)}.",
    ]


def surely_ahead(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """By how many standard errors, over prompts, one reading's accepted tokens a verification exceed another's."""
    gain = np.array([np.mean(a or [0]) - np.mean(b or [0]) for a, b in zip(ours, theirs, strict=True)])
    if len(gain) < 2 or not gain.any():
        return 0.0
    return float(gain.mean() / max(gain.std(ddof=1) / np.sqrt(len(gain)), 1e-9))


def _embedding_note(folder: Path, spec: DraftSpec, loaded: assemble.LoadedTarget) -> list[str]:
    own = folder / EMBEDDING_FILE
    if spec.width != spec.target_width or not own.is_file():
        return []
    if is_target_embedding(np.load(own, mmap_mode="r"), loaded.target.model().embed_tokens[...]):
        return []
    return ["note: its embedding is not the target's: it was measured with its own, which SGLang would replace"]


def options(reading: Reading) -> str:
    """The flags that answer the questions which a reading answers."""
    return " and ".join(f"--{name.replace('_', '-')}" for name in reading.answers)
