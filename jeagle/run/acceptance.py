"""Acceptance length by really decoding: target and draft ready to decode, prompts, and what was accepted."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import data, decoding, drafts, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec, Tables
from jeagle.run import assemble
from jeagle.runtime.manifest import check_intact
from jeagle.runtime.progress import Progress


class Weights(NamedTuple):
    """The arrays of both models."""

    target: Any
    draft: Any
    tables: Tables


class Bench(NamedTuple):
    """Two models ready to decode, and what belongs to them."""

    loaded: assemble.LoadedTarget
    models: decoding.Models
    weights: Weights
    mesh: Any


def open_bench(
    config: RunConfig,
    spec: DraftSpec,
    folder: Path,
    params: dict[str, np.ndarray] | None,
    *,
    dtype: str = "float32",
    loaded: assemble.LoadedTarget | None = None,
    start: assemble.Start | None = None,
) -> Bench:
    """Target and draft in `dtype`; without `params` the draft is as training starts it, from `start` where given."""
    mesh = assemble.mesh_of(config)
    loaded = loaded or assemble.load_target(config, mesh, dtype=dtype)
    vocabulary = data.load_tables(folder / "tables") if params is None else assemble.trained_vocabulary(folder)
    tables = assemble.make_tables(loaded.target, vocabulary, mesh)
    tables = assemble.draft_tables(tables, mesh, spec=spec, folder=folder, start=start)
    params = start.params if start and params is None else params
    if params is None:
        graphdef, state = assemble.make_draft(config, spec, loaded.target.spec, tables, mesh, dtype)
    else:
        kind = assemble.draft_class(config.draft)
        graphdef, state = assemble.draft_from_flat(spec, dtype, params, mesh, kind=kind)
    models = make_models(loaded.target.graphdef, graphdef, spec.aux_layers)
    return Bench(loaded, models, Weights(loaded.target.state, state, tables), mesh)


@functools.lru_cache(maxsize=8)
def make_models(target: Any, draft: Any, aux_layers: tuple[int, ...]) -> decoding.Models:
    """The two graphdefs as the functions that decoding runs."""

    def read(weights: Weights, cache: Any, tokens, positions, count, view):
        model = nnx.merge(target, weights.target)
        aux, last, cache = model.extend(tokens, positions, cache, aux_layers, count, view)
        return last, aux, cache

    def advance(weights: Weights, cache: Any, hidden, tokens, positions, view):
        module = nnx.merge(draft, weights.draft)
        return drafts.advance(module, weights.tables, hidden, tokens, positions, cache, view)

    return decoding.Models(
        target_cache=lambda w, *sizes: nnx.merge(target, w.target).empty_cache(*sizes[:2], jnp.float32, sizes[2]),
        read=read,
        logits=lambda w, last: nnx.merge(target, w.target).logits(last),
        move_slots=lambda w, *slots: nnx.merge(target, w.target).move_slots(*slots),
        draft_cache=lambda w, rows, room: drafts.empty_cache(nnx.merge(draft, w.draft), rows, room),
        fuse=lambda w, aux: nnx.merge(draft, w.draft).fuse(aux),
        draft=advance,
        draft_logits=lambda w, for_head: nnx.merge(draft, w.draft).logits(for_head),
        draft_ids=lambda w: w.tables.draft_to_target_D,
    )


def prompt_ids(bench: Bench, config: RunConfig, folder: Path, prompts: Path | None, most: int) -> list[np.ndarray]:
    """Prompts of a file, or the held-out conversations up to the answer, as the target's template renders them.

    Without a template, which a base model lacks, they are plain texts. UserError for one that the template refuses.
    """
    if prompts is None:
        check_intact(folder / "data", "held_out.jsonl")
    file, tokenizer = prompts or folder / "data" / "held_out.jsonl", bench.loaded.tokenizer
    arguments = data.parse_arguments(config.data.template_arguments)

    def ids(number: int, prompt: dict[str, Any]) -> np.ndarray:
        messages = prompt["messages"]
        if not tokenizer.chat_template:
            messages = [{"role": "text", "content": "\n\n".join(message["content"] for message in messages)}]
        try:
            return data.render_prompt(
                tokenizer,
                messages,
                system_prompt=config.data.system_prompt,
                tools=prompt.get("tools", ()),
                thinking=prompt.get("thinking", True),
                arguments=arguments,
            )
        except data.ConversationError as error:
            raise UserError(f"Prompt {number} of {file} cannot be measured: {error}.") from error

    return [ids(number, prompt) for number, prompt in enumerate(data.read_prompts(str(file))[: most or None], 1)]


class Decoded(NamedTuple):
    """The texts behind a report: speculative and plain."""

    speculative: list[decoding.SpeculativeAnswer]
    plain: list[decoding.PlainAnswer]


def measure(
    bench: Bench,
    prompts: Sequence[np.ndarray],
    *,
    how: decoding.Decoding,
    max_new_tokens: int,
    batch: int,
    label: str = "bench",
    width: int = 0,
    seed: int = 0,
) -> tuple[dict[str, Any], Decoded]:
    """Speculative and plain decoding of the same prompts -> (report, texts).

    UserError where they exceed the target's positions, for a tree where the target has recurrent layers, or where the
    target's numbers are not finite.
    """
    spec, shape = bench.loaded.target.spec, how.shape
    if shape.top_k > 1 and spec.is_recurrent:
        raise UserError(
            "The target has recurrent layers, which can read a chain of drafted tokens and no tree: give a top-k of 1."
        )
    room, most = max(map(len, prompts)) + max_new_tokens + 2 * shape.room, spec.max_positions
    if room > most:
        raise UserError(
            f"The longest prompt and its answer need {room} positions, the target has {most}: shorten the prompts or "
            "lower --max-new-tokens."
        )
    decode: dict[str, Any] = {"batch": batch, "width": width, "seed": seed}
    with Progress(2 * len(prompts), "decodings", label) as progress:
        more = max_new_tokens + shape.steps + 1  # so that a baseline's last draft can be judged whole
        try:
            plain = decoding.decode_plain(
                bench.models,
                bench.weights,
                prompts,
                tokens=more,
                sampling=how.sampling,
                on_done=progress.update,
                **decode,
            )
        except decoding.NotFiniteError as error:
            targets.check_text_finite(bench.loaded.target.graphdef, bench.weights.target, error.tokens)
            raise targets.broken_target("one of its layers") from error
        decoded = decoding.decode_speculative(
            bench.models,
            bench.weights,
            prompts,
            decoding=how,
            max_new_tokens=max_new_tokens,
            end_token_ids=bench.loaded.end_token_ids,
            on_done=lambda done: progress.update(len(prompts) + done),
            **decode,
        )
    report = decoding.acceptance_counters(decoded, shape)
    if how.rule == "target" or not how.sampling.temperature:  # else the texts are other draws of one distribution
        compared = [decoding.compare_answers(a, b) for a, b in zip(decoded, plain, strict=True)]
        report |= {
            "lossless": all(c.equal or c.excused for c in compared),
            "excused_ties": sum(c.excused for c in compared),
            "different": sum(not c.equal and not c.excused for c in compared),
        }
    report |= {
        "prompts_measured": len(prompts),
        "prompts_hash": hashlib.sha256(b"".join(p.tobytes() for p in prompts)).hexdigest()[:16],
        "draft_tokens": shape.steps,
        "tree_top_k": shape.top_k,
        "verified_tokens": shape.verify,
        **dataclasses.asdict(how.sampling),
        "rule": how.rule,
        "max_new_tokens": max_new_tokens,
    }
    return report, Decoded(decoded, plain)


def measure_baselines(
    folder: Path, prompts: Sequence[np.ndarray], decoded: Decoded, shape: decoding.TreeShape
) -> dict[str, dict[str, Any]]:
    """The same counters for drafters without a model, over the same answers.

    Returns:
      "prompt_lookup"; and for a run with training rows also "ngram", a 3-gram table of their answers, and "both", which
      takes the table where lookup finds nothing.
    """
    lookup = decoding.PromptLookup()
    drafters: dict[str, decoding.Drafter] = {"prompt_lookup": lookup}
    if (rows := folder / "data" / "train").is_dir():
        check_intact(folder / "data")
        documents = data.unpack(data.load_rows(rows))
        table = decoding.NGramTable((document.ids, document.supervised) for document in documents)
        drafters |= {"ngram": table, "both": decoding.FirstThatDrafts(lookup, table)}
    counters = {}
    for name, drafter in drafters.items():
        answers = [
            decoding.decode_without_draft_model(drafter, prompt, plain.tokens, len(answer.tokens), shape.steps)
            for prompt, plain, answer in zip(prompts, decoded.plain, decoded.speculative, strict=True)
        ]
        counters[name] = decoding.acceptance_counters(answers, decoding.TreeShape(shape.steps))
    return counters
