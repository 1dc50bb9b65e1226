"""`python -m jeagle.regenerate`: the target's own greedy answers to prompts.

A draft is trained on what its target would say. Answers are written as they finish, so that a stopped run continues
where it was; the file is put in order when the last one is there.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro

from jeagle import data, targets
from jeagle.data import read_prompts, render_prompt
from jeagle.errors import UserError
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write, fingerprint
from jeagle.runtime.mesh import make_mesh
from jeagle.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Answers prompts with the target's own greedy answers, in batches, and writes them as conversations."""

    target: str
    """A local folder (safetensors or GGUF), a hub id, or pypi:NAME==VERSION."""
    out: Path
    """File to write: .jsonl or .jsonl.gz. An unfinished one is continued."""
    prompts: str = "starter"
    """A jsonl file of {"turns": [...]} or {"messages": [...]} lines, or `starter` for those that come with jeagle."""
    limit: int = 0
    """Answer only the first so many prompts; 0 answers all."""
    max_new_tokens: int = 128
    """Longest answer."""
    batch: int = 64
    """Answers written side by side."""
    server: str = ""
    """An OpenAI-compatible server that answers instead, up to its /v1; --target is then its name for the model, and
    JEAGLE_SERVER_KEY the key that it asks for, if any."""
    concurrency: int = 64
    """Prompts that the server has under way at once."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the target's weights and matrix products."""
    system_prompt: str | None = None
    """Added where a prompt has none."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.regenerate")
    prepare_host()
    prompts = read_prompts(args.prompts)[: args.limit or None]
    written = regenerate(args, prompts)
    cut = sum(row["finish_reason"] == "length" for row in written)
    print(f"{len(written)} answers in {args.out}, {cut} of them cut off at {args.max_new_tokens} tokens")


def regenerate(args: Arguments, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers `prompts` ({"id", "category", "messages"}) and writes args.out; returns its rows, in order of id."""
    partial = args.out.with_name(args.out.name + ".partial")
    key = fingerprint([args.target, args.max_new_tokens, args.dtype, args.system_prompt])
    if args.server:
        rows, prompts = _ask_server(args, prompts, partial, fingerprint([key, args.server]))
    else:
        rows = {row["id"]: row for row in _read_partial(partial, key)}
        waiting = [prompt for prompt in prompts if prompt["id"] not in rows]
        if waiting:
            _answer(args, waiting, rows, partial, key)
    ordered = [rows[prompt["id"]] for prompt in sorted(prompts, key=lambda p: p["id"])]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered).encode()
    atomic_write(args.out, gzip.compress(text, mtime=0) if args.out.suffix == ".gz" else text)
    partial.unlink(missing_ok=True)
    return ordered


def _ask_server(
    args: Arguments, prompts: Sequence[dict[str, Any]], partial: Path, key: str
) -> tuple[dict[str, dict[str, Any]], Sequence[dict[str, Any]]]:
    """(rows by id, the prompts that the server answered). UserError where it refuses more than 1 % of them."""
    server = data.Server(
        args.server,
        args.target,
        key=os.environ.get("JEAGLE_SERVER_KEY", ""),
        concurrency=args.concurrency,
        max_new_tokens=args.max_new_tokens,
        system_prompt=args.system_prompt,
    )
    with Progress(len(prompts), "answers", "regenerate") as progress:
        rows, refused = data.answer(
            server, prompts, partial, key, lambda done, refused: progress.update(done, refused=refused)
        )
    if refused:
        first = next(iter(refused))
        said = (
            f"{len(refused)} of {len(prompts)} prompts are refused by {args.server}, such as {first} ({refused[first]})"
        )
        if len(refused) > 0.01 * len(prompts):
            raise UserError(f"{said}: leave them out.")
        print(f"note: {said}")
    return rows, [prompt for prompt in prompts if prompt["id"] in rows]


def _answer(args: Arguments, waiting: list[dict], rows: dict[str, dict], partial: Path, key: str) -> None:
    files = targets.resolve(args.target)
    tokenizer, source = targets.load_tokenizer(files), targets.open_weights(files)
    target = targets.load_target(source, make_mesh(data=1, fsdp=1, tensor=-1), jnp.dtype(args.dtype))
    prompt_ids = [render_prompt(tokenizer, p["messages"], system_prompt=args.system_prompt) for p in waiting]
    answers = targets.generate(
        target,
        prompt_ids,
        end_token_ids=targets.end_token_ids(tokenizer, source.config),
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
    )
    ends = set(targets.end_token_ids(tokenizer, source.config))
    tokens = 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as file, Progress(len(waiting), "answers", "regenerate") as progress:
        if file.tell() == 0:
            file.write(json.dumps({"key": key}) + "\n")
        for done, answer in enumerate(answers, 1):
            prompt, tokens = waiting[answer.index], tokens + len(answer.tokens)
            said = answer.tokens[:-1] if int(answer.tokens[-1]) in ends else answer.tokens
            reply = {"role": "assistant", "content": tokenizer.decode(said)}
            row = {**prompt, "messages": [*prompt["messages"], reply], "finish_reason": answer.finish_reason}
            row["model"] = args.target
            rows[prompt["id"]] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(done, tokens=tokens)


def _read_partial(path: Path, key: str) -> list[dict[str, Any]]:
    """Rows of an unfinished file, a last line that was cut off left out. UserError if it was made otherwise."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]
    if not whole or json.loads(whole[0]).get("key") != key:
        raise UserError(f"{path} was begun with another target or other settings: delete it to start anew.")
    atomic_write(path, "".join(line + "\n" for line in whole))
    return [json.loads(line) for line in whole[1:]]


if __name__ == "__main__":
    run(main)
