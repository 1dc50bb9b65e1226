"""Answers to prompts, by the target itself or by a server: the settings, and each of the two ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

import jeagle
from jeagle import data, targets
from jeagle.config import MeshConfig
from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint
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
    self_instruct: int = 0
    """Prompts that the target writes itself, in place of --prompts: this many, none nearly like another."""
    turn_temperature: float = 1.0
    """Temperature at which it writes them; only the answers follow --temperature."""
    turn_tokens: int = 256
    """Longest of them; one that is cut off is not used."""
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


_NOT_SHAPING = (  # of the arguments: an answer does not follow from them, or only by way of its prompt
    *("out", "prompts", "limit", "batch", "concurrency", "mesh"),
    *("self_instruct", "turn_temperature", "turn_tokens"),
)


def made_from(args: Arguments) -> dict[str, Any]:
    """What an answer follows from, beside its prompt."""
    idle = _NOT_SHAPING if args.temperature else (*_NOT_SHAPING, "top_p", "top_k", "seed")
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in idle}
    settings["server"] = bool(args.server)  # one that moved, or another of the same model, goes on with its answers
    return {"version": jeagle.__version__, **json.loads(json.dumps(settings))}


def servers_answers(
    args: Arguments, prompts: Sequence[dict[str, Any]], file: data.AnswerFile
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
            server,
            prompts,
            file.partial,
            fingerprint(file.made_from),
            lambda done, refused: progress.update(done, refused=refused),
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


class Opened:
    """A target that is loaded when it is first asked, and once."""

    def __init__(self, args: Arguments):
        self._args = args

    @functools.cached_property
    def tokenizer(self) -> Any:
        return targets.load_tokenizer(targets.resolve(self._args.target))

    @functools.cached_property
    def _source(self) -> Any:
        return targets.open_weights(targets.resolve(self._args.target))

    @functools.cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        return targets.end_token_ids(self.tokenizer, self._source.config)

    @functools.cached_property
    def target(self) -> targets.Target:
        args, mesh = self._args, self._args.mesh
        with bytes_progress("load target") as progress:
            return targets.load_target(
                self._source,
                make_mesh(mesh.data, mesh.fsdp, mesh.tensor, expert=mesh.expert),
                jnp.dtype(args.dtype),
                stored="" if args.weights == "dtype" else args.weights,
                family=targets.own_family(args.family) if args.family else None,
                progress=progress,
            )


def own_answers(
    args: Arguments, waiting: Sequence[dict[str, Any]], file: data.AnswerFile, opened: Opened
) -> dict[str, dict[str, Any]]:
    """Rows by id of the answers that the target itself writes."""
    tokenizer, ends = opened.tokenizer, opened.end_token_ids
    sampling = targets.Sampling(args.temperature, args.top_p, args.top_k)
    answers = targets.generate(
        opened.target,
        [_prompt_ids(tokenizer, prompt, args.system_prompt) for prompt in waiting],
        end_token_ids=ends,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        sampling=sampling,
        seed=args.seed,
        numbers=[zlib.crc32(p["id"].encode()) for p in waiting],
        stops=stops_at(tokenizer, args.stop) if args.stop else None,
    )
    rows, tokens = {}, 0
    with file.growing() as append, Progress(len(waiting), "answers", "regenerate") as progress:
        for done, answer in enumerate(answers, 1):
            prompt, tokens = waiting[answer.index], tokens + len(answer.tokens)
            said = answer.tokens[:-1] if int(answer.tokens[-1]) in ends else answer.tokens
            text = tokenizer.decode(said)
            text = text[: min((text.find(stop) for stop in args.stop if stop in text), default=len(text))]
            reply = {"role": "assistant", "content": text}
            row = {**prompt, "messages": [*prompt["messages"], reply], "finish_reason": answer.finish_reason}
            rows[prompt["id"]] = row | {"model": args.target}
            append(rows[prompt["id"]])
            progress.update(done, tokens=tokens)
    return rows


def _prompt_ids(tokenizer: Any, prompt: dict[str, Any], system_prompt: str | None) -> np.ndarray:
    tools, thinking = prompt.get("tools", ()), prompt.get("thinking", True)
    return data.render_prompt(
        tokenizer, prompt["messages"], system_prompt=system_prompt, tools=tools, thinking=thinking
    )


def stops_at(tokenizer: Any, texts: Sequence[str]) -> Callable[[np.ndarray], int | None]:
    """Where an answer ends: at the first token with which one of the texts stands in it."""

    def found(tokens: np.ndarray) -> bool:
        said = tokenizer.decode(tokens)
        return any(text in said for text in texts)

    def stops(tokens: np.ndarray) -> int | None:
        return next((n for n in range(1, len(tokens) + 1) if found(tokens[:n])), None) if found(tokens) else None

    return stops
