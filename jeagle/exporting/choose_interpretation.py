"""Measures the interpretations of a published draft by decoding a few prompts, and chooses the most accepted one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle import decoding
from jeagle.config import RunConfig
from jeagle.exchange import Interpretation, same_embedding
from jeagle.exporting.run_reader import MEASURED_FILE
from jeagle.interfaces import DraftSpec
from jeagle.run import acceptance, assemble
from jeagle.run.draft_init import EMBEDDING_FILE
from jeagle.runtime.progress import Progress

_CLEAR_LEAD = 2.0  # standard errors between the best interpretation and the next
_HARDLY_ACCEPTED = 1.1  # a draft for another target, or a wrong interpretation, has a shorter acceptance length


class MeasuredInterpretation(NamedTuple):
    """An interpretation and its acceptance.

    Attributes:
      rounds: for each prompt, how many drafted tokens each verification accepted.
      counters: those of `decoding.counters`.
    """

    interpretation: Interpretation
    rounds: list[list[int]]
    counters: dict[str, Any]


def choose_interpretation(
    config: RunConfig,
    folder: Path,
    interpretations: Sequence[Interpretation],
    params: dict[str, np.ndarray],
    *,
    step: int,
    prompts: Path | None,
) -> tuple[DraftSpec, list[str]]:
    """Chooses the interpretation whose draft has the longest acceptance, and writes its metrics into the run's folder.

    Args:
      config: of the run; its `bench` says how many prompts are decoded, and how many tokens are drafted and generated.
      folder: of the run, with its tables and its draft.json.
      params: the draft's parameters by name, float32.
      step: of the run's checkpoint, for the metrics.
      prompts: a file, or None for the run's own prompts.

    Returns:
      (the chosen spec, lines for the user: the table of all interpretations, and how clear the choice is).
    """
    target = assemble.load_target(config, assemble.mesh_of(config), dtype="float32")
    measured = []
    with Progress(len(interpretations), "interpretations", "measure") as progress:
        for number, interpretation in enumerate(interpretations, 1):
            measured.append(_measure(config, folder, interpretation, params, target, prompts))
            progress.update(number)
    ranked = sorted(measured, key=lambda m: -m.counters["acceptance_length"])
    best = ranked[0]
    metrics = best.counters | {"prompts_measured": len(best.rounds), "draft_tokens": config.bench.draft_tokens}
    metrics |= {"step": step, "max_new_tokens": config.bench.max_new_tokens, "dtype": "float32", "temperature": 0}
    (folder / MEASURED_FILE).write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    lines = _report(measured, ranked)
    if not target.tokenizer.chat_template:
        lines.append("note: the target has no chat template: the prompts were measured as plain texts")
    spec, own = best.interpretation.spec, folder / EMBEDDING_FILE
    if spec.width == spec.target_width and own.is_file():
        target_embed_VW = target.target.model().embed_tokens[...]
        if not same_embedding(np.load(own, mmap_mode="r"), target_embed_VW, spec.target_vocab):
            lines.append("note: the draft has its own embedding and was measured with it; SGLang would replace it")
    return spec, lines


def _measure(
    config: RunConfig,
    folder: Path,
    interpretation: Interpretation,
    params: dict[str, np.ndarray],
    target: assemble.LoadedTarget,
    prompts: Path | None,
) -> MeasuredInterpretation:
    bench = acceptance.open_bench(config, interpretation.spec, folder, params, loaded=target)
    ids = acceptance.prompt_ids(bench, config, folder, prompts, config.bench.max_prompts)
    shape = decoding.TreeShape(config.bench.draft_tokens)
    decoded = decoding.decode_speculative(
        bench.models,
        bench.weights,
        ids,
        decoding=decoding.Decoding(shape),
        max_new_tokens=config.bench.max_new_tokens,
        end_token_ids=target.end_token_ids,
        batch=min(len(ids), config.bench.batch),
    )
    counters = decoding.acceptance_counters(decoded, shape)
    return MeasuredInterpretation(interpretation, [list(answer.rounds) for answer in decoded], counters)


def _report(measured: list[MeasuredInterpretation], ranked: list[MeasuredInterpretation]) -> list[str]:
    """Returns the table, which interpretation is chosen, and how certain the choice is."""
    width = max(len(text) for text in [*(m.interpretation.describe() for m in measured), "interpretation"])
    lines = [f"{'interpretation':<{width}}  acceptance length  by position"]
    for m in measured:
        by_position = " ".join(f"{share:.3f}" for share in m.counters["acceptance_by_position"])
        length = m.counters["acceptance_length"]
        lines.append(f"{m.interpretation.describe():<{width}}  {length:<17.3f}  {by_position}")
    best = ranked[0]
    if best.counters["acceptance_length"] < _HARDLY_ACCEPTED:
        lines.append("warning: hardly any token is accepted in any interpretation: is this the draft's target?")
    if len(ranked) == 1:
        return lines
    chosen = best.interpretation
    lead = lead_in_standard_errors(best.rounds, ranked[1].rounds)
    if lead >= _CLEAR_LEAD:
        return [*lines, f"chosen: {chosen.describe()}"]
    return [
        *lines,
        f"chosen: {chosen.describe()}, but no interpretation is clearly the best one: it is {lead:.1f} standard errors "
        f"ahead of {ranked[1].interpretation.describe()}. Measure more prompts with --max-prompts, or answer the "
        f"question yourself with {chosen.flags()}.",
    ]


def lead_in_standard_errors(rounds: list[list[int]], other_rounds: list[list[int]]) -> float:
    """Returns the mean difference, over prompts, of the tokens accepted in a verification, in its standard errors.

    Args:
      rounds, other_rounds: as in `MeasuredInterpretation`, of the same prompts.
    """
    gain = np.array([np.mean(a or [0]) - np.mean(b or [0]) for a, b in zip(rounds, other_rounds, strict=True)])
    if len(gain) < 2 or not gain.any():
        return 0.0
    return float(gain.mean() / max(gain.std(ddof=1) / np.sqrt(len(gain)), 1e-9))
