"""`python -m jeagle.regenerate`: the target's own answers to prompts.

A draft is trained on what its target would say. Answers are written as they finish, so that a stopped run continues
where it was; the file is put in order when the last one is there, and beside it stands what it was made from.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

import jeagle
from jeagle import data, targets
from jeagle.config import MeshConfig
from jeagle.data import read_prompts, render_prompt
from jeagle.errors import UserError
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write, differences, fingerprint
from jeagle.runtime.mesh import make_mesh
from jeagle.runtime.progress import Progress, bytes_progress

# Every token is a forward over all weights: to gather what fsdp splits would take most of the time.
TENSOR_PARALLEL = MeshConfig(fsdp=1, tensor=-1)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Answers prompts as the target itself does, in batches, and writes them as conversations."""

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
    temperature: float = 0.0
    """0: the most likely token each time; above: drawn by chance, at this temperature."""
    top_p: float = 1.0
    """Drawn only from the fewest most likely tokens whose probabilities reach this; 1: from all."""
    top_k: int = 0
    """Drawn only from so many most likely tokens; 0: from all."""
    seed: int = 0
    """Of chance: an answer follows from it and from its prompt, not from the other prompts or the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are left out of it, besides the target's own end tokens."""
    batch: int = 64
    """Answers written side by side."""
    server: str = ""
    """An OpenAI-compatible server that answers instead, up to its /v1; --target is then its name for the model, and
    JEAGLE_SERVER_KEY the key that it asks for, if any."""
    concurrency: int = 64
    """Prompts that the server has under way at once."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the target's weights and matrix products."""
    weights: Literal["dtype", "int8", "fp8"] = "dtype"
    """How the layers' kernels are kept in memory."""
    family: str = ""
    """package.module:NAME of a Family that describes a model of your own: docs/adding_a_target.md."""
    mesh: MeshConfig = TENSOR_PARALLEL
    """How the devices are used."""
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
    """Answers `prompts` ({"id", "category", "messages"}) and writes args.out; returns its rows, in order of id.

    Answers that args.out holds already, made from the same settings, are kept.
    """
    partial, made_from = _beside(args.out, ".partial"), _made_from(args)
    rows = _finished(args.out, made_from)
    waiting = [prompt for prompt in prompts if prompt["id"] not in rows]
    if waiting and args.server:
        rows |= _ask_server(args, waiting, partial, fingerprint(made_from))
        prompts = [prompt for prompt in prompts if prompt["id"] in rows]
    elif waiting:
        rows |= {row["id"]: row for row in _read_partial(partial, made_from)}
        waiting = [prompt for prompt in waiting if prompt["id"] not in rows]
        if waiting:
            _answer(args, waiting, rows, partial, made_from)
    ordered = [rows[prompt["id"]] for prompt in sorted(prompts, key=lambda p: p["id"])]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered).encode()
    atomic_write(args.out, gzip.compress(text, mtime=0) if args.out.suffix == ".gz" else text)
    atomic_write(_beside(args.out, ".made_from.json"), json.dumps(made_from, indent=1) + "\n")
    partial.unlink(missing_ok=True)
    return ordered


_NOT_SHAPING = ("out", "prompts", "limit", "batch", "concurrency", "mesh")  # of the arguments: answers do not follow


def _made_from(args: Arguments) -> dict[str, Any]:
    idle = _NOT_SHAPING if args.temperature else (*_NOT_SHAPING, "top_p", "top_k", "seed")
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in idle}
    return {"version": jeagle.__version__, **json.loads(json.dumps(settings))}


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _finished(out: Path, made_from: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by id of a finished file, if it was made from the same settings; says so if it was not."""
    note = _beside(out, ".made_from.json")
    if not note.is_file() or not out.is_file():
        return {}
    if fields := differences(json.loads(note.read_text()), made_from):
        print(f"regenerate: {', '.join(fields)} changed since {out} was made; making it anew", flush=True)
        return {}
    text = gzip.decompress(out.read_bytes()) if out.suffix == ".gz" else out.read_bytes()
    return {row["id"]: row for row in map(json.loads, text.decode().splitlines())}


def _ask_server(
    args: Arguments, prompts: Sequence[dict[str, Any]], partial: Path, key: str
) -> dict[str, dict[str, Any]]:
    """Rows by id of the prompts that the server answered. UserError where it refuses more than 1 % of them."""
    server = data.Server(
        args.server,
        args.target,
        key=os.environ.get("JEAGLE_SERVER_KEY", ""),
        concurrency=args.concurrency,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        system_prompt=args.system_prompt,
        more=_asked_for(args),
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
    return rows


def _asked_for(args: Arguments) -> dict[str, Any]:
    """What a server is told of sampling, beside the temperature: only what differs from its own default."""
    fields = {"top_p": (args.top_p, 1.0), "top_k": (args.top_k, 0), "stop": (list(args.stop), [])}
    seed = {"seed": args.seed} if args.temperature else {}
    return {name: value for name, (value, default) in fields.items() if value != default} | seed


def _answer(args: Arguments, waiting: list[dict], rows: dict[str, dict], partial: Path, made_from: dict) -> None:
    sampling = targets.Sampling(args.temperature, args.top_p, args.top_k)
    files = targets.resolve(args.target)
    tokenizer, source = targets.load_tokenizer(files), targets.open_weights(files)
    prompt_ids = [render_prompt(tokenizer, p["messages"], system_prompt=args.system_prompt) for p in waiting]
    ends = targets.end_token_ids(tokenizer, source.config)
    answers = targets.generate(
        _target(args, source),
        prompt_ids,
        end_token_ids=ends,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        sampling=sampling,
        seed=args.seed,
        numbers=[zlib.crc32(p["id"].encode()) for p in waiting],
        stops=_stops(tokenizer, args.stop) if args.stop else None,
    )
    tokens = 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as file, Progress(len(waiting), "answers", "regenerate") as progress:
        if file.tell() == 0:
            file.write(json.dumps({"made_from": made_from}) + "\n")
        for done, answer in enumerate(answers, 1):
            prompt, tokens = waiting[answer.index], tokens + len(answer.tokens)
            said = answer.tokens[:-1] if int(answer.tokens[-1]) in ends else answer.tokens
            text = tokenizer.decode(said)
            text = text[: min((text.find(stop) for stop in args.stop if stop in text), default=len(text))]
            reply = {"role": "assistant", "content": text}
            row = {**prompt, "messages": [*prompt["messages"], reply], "finish_reason": answer.finish_reason}
            row["model"] = args.target
            rows[prompt["id"]] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(done, tokens=tokens)


def _target(args: Arguments, source: Any) -> targets.Target:
    mesh = make_mesh(args.mesh.data, args.mesh.fsdp, args.mesh.tensor, expert=args.mesh.expert)
    with bytes_progress("load target") as progress:
        return targets.load_target(
            source,
            mesh,
            jnp.dtype(args.dtype),
            stored="" if args.weights == "dtype" else args.weights,
            family=targets.own_family(args.family) if args.family else None,
            progress=progress,
        )


def _stops(tokenizer: Any, texts: Sequence[str]) -> Callable[[np.ndarray], int | None]:
    """Where an answer ends: at the first token with which one of the texts stands in it."""

    def found(tokens: np.ndarray) -> bool:
        said = tokenizer.decode(tokens)
        return any(text in said for text in texts)

    def stops(tokens: np.ndarray) -> int | None:
        return next((n for n in range(1, len(tokens) + 1) if found(tokens[:n])), None) if found(tokens) else None

    return stops


def _read_partial(path: Path, made_from: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an unfinished file, a last line that was cut off left out. UserError if it was made otherwise."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]
    fields = differences(json.loads(whole[0]).get("made_from", {}), made_from) if whole else ["everything"]
    if fields:
        raise UserError(f"{path} was begun with other settings ({', '.join(fields)}): delete it to start anew.")
    atomic_write(path, "".join(line + "\n" for line in whole))
    return [json.loads(line) for line in whole[1:]]


if __name__ == "__main__":
    run(main)
