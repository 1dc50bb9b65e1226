"""`python -m jeagle.regenerate` generates the target's own answers to prompts, which the target can write too.

A draft learns best from on-policy data, which are the answers that its target generates. Every answer is saved as soon
as it is finished, so that an interrupted run continues where it was. The finished file is sorted, and the settings
that it was made from are written beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from jeagle import data
from jeagle.config import SamplingConfig
from jeagle.errors import UserError
from jeagle.run.answers import (
    RegenerateArguments,
    answer_settings,
    answers_from_server,
    answers_from_target,
    target_loader,
)
from jeagle.run.assemble import LoadedTarget
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_replaceable


def main(arguments: list[str]) -> None:
    args = tyro.cli(RegenerateArguments, args=arguments, prog="python -m jeagle.regenerate")
    prepare_host()
    load = target_loader(args)
    with data.AnswerFile(args.out, answer_settings(args)).alone():
        prompts = self_instructed(args, load) if args.self_instruct else data.read_prompts(args.prompts)
        rows = regenerate(args, prompts[: args.limit or None], load)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    print(f"{len(rows)} answers in {args.out}, of which {cut} are cut off at {args.max_new_tokens} tokens")


def regenerate(
    args: RegenerateArguments,
    prompts: Sequence[dict[str, Any]],
    load: Callable[[], LoadedTarget] | None = None,
) -> list[dict[str, Any]]:
    """Answers prompts and writes args.out; returns its rows, sorted by id.

    Answers that args.out already contains are kept if they were made with the same settings.

    Args:
      prompts: {"id", "category", "messages"}.
      load: `target_loader` of the arguments, if the target is used more than once.
    """
    file = data.AnswerFile(args.out, answer_settings(args))
    with file.alone():
        rows = file.finished()
        waiting = [prompt for prompt in prompts if prompt["id"] not in rows]
        if waiting and args.server:
            rows |= answers_from_server(args, waiting, file)
            prompts = [prompt for prompt in prompts if prompt["id"] in rows]
        elif waiting:
            rows |= file.unfinished()
            waiting = [prompt for prompt in waiting if prompt["id"] not in rows]
            if waiting:
                rows |= answers_from_target(args, waiting, file, (load or target_loader(args))())
        ordered = [rows[prompt["id"]] for prompt in sorted(prompts, key=lambda p: p["id"])]
        file.finish(ordered)
        return ordered


def self_instructed(args: RegenerateArguments, load: Callable[[], LoadedTarget] | None = None) -> list[dict[str, Any]]:
    """Lets the target write args.self_instruct prompts without near-duplicates; fewer if it repeats itself.

    The prompts are answers to requests, in OUT.turns.jsonl, so that they are continued like other answers. Which of
    them are kept follows from the seed alone. OUT.variety.json says how varied they are.
    """
    wanted, out = args.self_instruct, Path(f"{args.out}.turns.jsonl")
    check_replaceable(f"{args.out}.variety.json", data.VARIETY)
    sampling = SamplingConfig(
        max_new_tokens=args.turn_tokens, temperature=args.turn_temperature, batch=args.batch, seed=args.seed
    )
    asking = dataclasses.replace(args, out=out, stop=(), system_prompt=None, **dataclasses.asdict(sampling))
    most = 4 * wanted + 64
    existing = len(out.read_bytes().splitlines()) if out.is_file() else 0
    count = min(max(math.ceil(1.25 * wanted), existing), most)
    while True:
        answered = regenerate(asking, data.prompt_requests(count, args.seed), load)
        written = data.collect_prompts(answered, wanted)
        if len(written.prompts) == wanted or count == most:
            break
        count = min(math.ceil(1.1 * count * wanted / max(len(written.prompts), 1)) + 8, most)
    if not written.prompts:
        raise UserError(
            f"{args.target} wrote no usable prompt in {count} attempts ({written.unusable} empty or cut off at "
            f"{args.turn_tokens} tokens; see {out}): --self-instruct needs an instruct model."
        )
    _report_variety(args, written)
    return written.prompts


def _report_variety(args: RegenerateArguments, written: data.WrittenPrompts) -> None:
    texts = [prompt["messages"][0]["content"] for prompt in written.prompts]
    counts = {"unusable": written.unusable, "repeated": written.repeated, "near_duplicates": written.near}
    metrics = {"kept": len(texts)} | counts | data.variety(texts, written.signatures)
    atomic_write(f"{args.out}.variety.json", json.dumps(metrics, indent=1) + "\n", data.VARIETY)
    print(
        f"{len(texts)} prompts written; dropped: {written.repeated} repetitions, {written.near} near-duplicates, "
        f"{written.unusable} empty or cut off. Variety: "
        + ", ".join(f"{n.replace('_', '-')} {metrics[n]:.2f}" for n in ("distinct_1", "distinct_2", "distinct_3"))
        + f", mean similarity to the nearest other prompt {metrics['nearest_mean']:.2f}"
    )
    if len(texts) < args.self_instruct:
        print(
            f"warning: {args.target} repeats itself: {len(texts)} of {args.self_instruct} prompts; raise "
            "--turn-temperature"
        )


if __name__ == "__main__":
    run(main)
