"""`python -m jeagle.regenerate`: the target's own answers to prompts, which it can write itself too.

A draft is trained on what its target would say. Answers are written as they finish, so that a stopped run continues
where it was; the file is put in order when the last one is there, and beside it stands what it was made from.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import tyro

from jeagle import data
from jeagle.errors import UserError
from jeagle.run.answers import Arguments, Opened, made_from, own_answers, servers_answers
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_replaceable


def main(arguments: list[str]) -> None:
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.regenerate")
    prepare_host()
    opened = Opened(args)
    with data.AnswerFile(args.out, made_from(args)).alone():
        prompts = self_instructed(args, opened) if args.self_instruct else data.read_prompts(args.prompts)
        written = regenerate(args, prompts[: args.limit or None], opened)
    cut = sum(row["finish_reason"] == "length" for row in written)
    print(f"{len(written)} answers in {args.out}, {cut} of them cut off at {args.max_new_tokens} tokens")


def regenerate(
    args: Arguments, prompts: Sequence[dict[str, Any]], opened: Opened | None = None
) -> list[dict[str, Any]]:
    """Answers `prompts` ({"id", "category", "messages"}) and writes args.out; returns its rows, in order of id.

    Answers that args.out holds already, made from the same settings, are kept. `opened` is the target, where it is
    wanted more than once.
    """
    file = data.AnswerFile(args.out, made_from(args))
    with file.alone():
        return _regenerate(args, prompts, file, opened)


def _regenerate(
    args: Arguments, prompts: Sequence[dict[str, Any]], file: data.AnswerFile, opened: Opened | None
) -> list[dict[str, Any]]:
    rows = file.finished()
    waiting = [prompt for prompt in prompts if prompt["id"] not in rows]
    if waiting and args.server:
        rows |= servers_answers(args, waiting, file)
        prompts = [prompt for prompt in prompts if prompt["id"] in rows]
    elif waiting:
        rows |= file.unfinished()
        waiting = [prompt for prompt in waiting if prompt["id"] not in rows]
        if waiting:
            rows |= own_answers(args, waiting, file, opened or Opened(args))
    ordered = [rows[prompt["id"]] for prompt in sorted(prompts, key=lambda p: p["id"])]
    file.finish(ordered)
    return ordered


def self_instructed(args: Arguments, opened: Opened | None = None) -> list[dict[str, Any]]:
    """args.self_instruct prompts that the target writes, none nearly like another; fewer where it repeats itself.

    The turns are answers to requests, in OUT.turns.jsonl, so that they are resumed as answers are. Which of them are
    kept follows from the seed alone. OUT.variety.json says how varied they are.
    """
    wanted, turns_file = args.self_instruct, data.beside(args.out, ".turns.jsonl")
    check_replaceable(data.beside(args.out, ".variety.json"), data.VARIETY)
    asking = dataclasses.replace(
        args,
        out=turns_file,
        temperature=args.turn_temperature,
        max_new_tokens=args.turn_tokens,
        top_p=1.0,
        top_k=0,
        stop=(),
        system_prompt=None,
    )
    most = 4 * wanted + 64
    have = len(turns_file.read_bytes().splitlines()) if turns_file.is_file() else 0
    count = min(max(math.ceil(1.25 * wanted), have), most)
    while True:
        turns = data.turns_of(regenerate(asking, data.requests(count, args.seed), opened), wanted)
        if len(turns.prompts) == wanted or count == most:
            break
        count = min(math.ceil(1.1 * count * wanted / max(len(turns.prompts), 1)) + 8, most)
    if not turns.prompts:
        raise UserError(
            f"{args.target} wrote no usable prompt in {count} attempts ({turns.unusable} empty or cut off at "
            f"{args.turn_tokens} tokens; see {turns_file}): --self-instruct needs an instruct model."
        )
    _tell_variety(args, turns, wanted)
    return turns.prompts


def _tell_variety(args: Arguments, turns: data.Turns, wanted: int) -> None:
    texts = [prompt["messages"][0]["content"] for prompt in turns.prompts]
    counts = {"kept": len(texts), "unusable": turns.unusable, "repeated": turns.repeated, "near_duplicates": turns.near}
    metrics = counts | data.variety(texts, turns.signatures)
    atomic_write(data.beside(args.out, ".variety.json"), json.dumps(metrics, indent=1) + "\n", data.VARIETY)
    print(
        f"{len(texts)} prompts written; left out: {turns.repeated} repeated, {turns.near} nearly the same as another, "
        f"{turns.unusable} empty or cut off. Variety: "
        + ", ".join(f"{n.replace('_', '-')} {metrics[n]:.2f}" for n in ("distinct_1", "distinct_2", "distinct_3"))
        + f", likeness to the nearest other {metrics['nearest_mean']:.2f}"
    )
    if len(texts) < wanted:
        print(f"warning: {args.target} repeats itself: {len(texts)} of {wanted} prompts; raise --turn-temperature")


if __name__ == "__main__":
    run(main)
