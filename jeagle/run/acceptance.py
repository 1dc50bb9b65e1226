"""Acceptance length by really decoding: target and draft ready to decode, prompts, and what was accepted."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
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

    def verify(weights: Weights, cache: Any, tokens: jax.Array, positions: jax.Array, count: jax.Array | None = None):
        model = nnx.merge(target, weights.target)
        aux, last, cache = model.extend(tokens, positions, cache, aux_layers, count)
        return *targets.greedy_and_gap(model, last), aux, cache

    def draft_from_own(weights: Weights, cache: Any, state: jax.Array, tokens: jax.Array, positions: jax.Array):
        module = nnx.merge(draft, weights.draft)
        for_head, state, cache = drafts.advance(module, weights.tables, state, tokens, positions, cache)
        return drafts.greedy_token(module, weights.tables, for_head), state, cache

    def draft_from_aux(weights: Weights, cache: Any, aux: jax.Array, tokens: jax.Array, positions: jax.Array):
        fused = nnx.merge(draft, weights.draft).fuse(aux)
        return draft_from_own(weights, cache, fused, tokens, positions)

    return decoding.Models(
        target_cache=lambda w, *sizes: nnx.merge(target, w.target).empty_cache(*sizes[:2], jnp.float32, sizes[2]),
        draft_cache=lambda w, rows, room: drafts.empty_cache(nnx.merge(draft, w.draft), rows, room),
        verify=verify,
        draft_from_aux=draft_from_aux,
        draft_from_own=draft_from_own,
    )


def prompt_ids(bench: Bench, config: RunConfig, folder: Path, prompts: Path | None, most: int) -> list[np.ndarray]:
    """Prompts of a file, or the held-out conversations up to the answer, as the target's template renders them."""
    if prompts is None:
        check_intact(folder / "data", "held_out.jsonl")
    asked = data.read_prompts(str(prompts or folder / "data" / "held_out.jsonl"))[: most or None]
    arguments = data.parse_arguments(config.data.template_arguments)
    return [
        data.render_prompt(
            bench.loaded.tokenizer,
            p["messages"],
            system_prompt=config.data.system_prompt,
            tools=p.get("tools", ()),
            thinking=p.get("thinking", True),
            arguments=arguments,
        )
        for p in asked
    ]


class Decoded(NamedTuple):
    """The texts behind a report: speculative and plain."""

    speculative: list[decoding.SpeculativeAnswer]
    plain: list[decoding.GreedyAnswer]


def measure(
    bench: Bench,
    prompts: Sequence[np.ndarray],
    *,
    draft_tokens: int,
    max_new_tokens: int,
    batch: int,
    label: str = "bench",
    width: int = 0,
) -> tuple[dict[str, Any], Decoded]:
    """Speculative and plain decoding of the same prompts -> (report, texts).

    UserError where they exceed the target's positions, or the target's numbers are not finite.
    """
    room, most = max(map(len, prompts)) + max_new_tokens + 2 * draft_tokens, bench.loaded.target.spec.max_positions
    if room > most:
        raise UserError(
            f"The longest prompt and its answer need {room} positions, the target has {most}: shorten the prompts or "
            "lower --max-new-tokens."
        )
    decode = {"batch": batch, "width": width}
    with Progress(2 * len(prompts), "decodings", label) as progress:
        more = max_new_tokens + draft_tokens + 1  # so that a baseline's last draft can be judged whole
        try:
            plain = decoding.decode_greedy(
                bench.models, bench.weights, prompts, tokens=more, on_done=progress.update, **decode
            )
        except decoding.NotFiniteError as error:
            targets.check_text_finite(bench.loaded.target.graphdef, bench.weights.target, error.tokens)
            raise targets.broken_target("one of its layers") from error
        decoded = decoding.decode_speculative(
            bench.models,
            bench.weights,
            prompts,
            draft_tokens=draft_tokens,
            max_new_tokens=max_new_tokens,
            end_token_ids=bench.loaded.end_token_ids,
            on_done=lambda done: progress.update(len(prompts) + done),
            **decode,
        )
    compared = [decoding.compare_answers(a, b) for a, b in zip(decoded, plain, strict=True)]
    report = decoding.acceptance_counters(decoded, draft_tokens) | {
        "lossless": all(c.equal or c.excused for c in compared),
        "excused_ties": sum(c.excused for c in compared),
        "different": sum(not c.equal and not c.excused for c in compared),
        "prompts_measured": len(prompts),
        "prompts_hash": hashlib.sha256(b"".join(p.tobytes() for p in prompts)).hexdigest()[:16],
        "draft_tokens": draft_tokens,
        "max_new_tokens": max_new_tokens,
    }
    return report, Decoded(decoded, plain)


def measure_ngram(
    folder: Path, prompts: Sequence[np.ndarray], decoded: Decoded, *, draft_tokens: int
) -> dict[str, Any]:
    """The same counters for a 3-gram table of the run's training answers, over the same answers."""
    check_intact(folder / "data")
    documents = data.unpack(data.load_rows(folder / "data" / "train"))
    table = decoding.NGramTable((document.ids, document.supervised) for document in documents)
    measured = [
        decoding.decode_ngram(table, prompt, plain.tokens, len(answer.tokens), draft_tokens)
        for prompt, plain, answer in zip(prompts, decoded.plain, decoded.speculative, strict=True)
    ]
    return decoding.acceptance_counters(measured, draft_tokens)
