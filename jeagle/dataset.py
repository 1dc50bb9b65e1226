"""`python -m jeagle.prepare --config FILE`: conversations -> packed rows and a draft room."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import jeagle
from jeagle import data as room
from jeagle import targets
from jeagle.config import RunConfig
from jeagle.joints import Batch
from jeagle.runtime.manifest import (
    atomic_folder,
    atomic_write,
    differences,
    file_fingerprint,
    fingerprint,
    finished_manifest,
    read_manifest,
    write_manifest,
)
from jeagle.runtime.progress import Progress

CHECKED_FIRST, CHECKED_EVERY = 200, 100  # which conversations' ids are compared with apply_chat_template's


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where a run's data lies, and what is known of it.

    Attributes:
      data, tables: folders. statistics: counts, as the manifest holds them.
      reused: the rows were there already, made from the same inputs.
    """

    data: Path
    tables: Path
    statistics: dict[str, Any]
    reused: bool = False


def prepare(config: RunConfig) -> Prepared:
    """Makes the run's data and tables, or finds them made from the same inputs."""
    files = targets.resolve(config.target.ref)
    tokenizer, target_config = targets.load_tokenizer(files), targets.open_weights(files).config
    ends = targets.end_token_ids(tokenizer, target_config)
    source = room.starter_answers() if config.data.source == "starter" else Path(config.data.source)
    if not source.is_file():
        room.read_conversations(config.data.source)  # says what is wrong
    made_from = {
        "version": jeagle.__version__,
        "source": file_fingerprint(source),
        "tokenizer": room.tokenizer_hash(tokenizer),
        "target_vocab": int(target_config["vocab_size"]),
        "template": room.template_hash(tokenizer),
        "end_token_ids": list(ends),
        "max_conversations": config.data.max_conversations,
        "row_length": config.data.row_length,
        "held_out": config.data.held_out,
        "system_prompt": config.data.system_prompt,
    }
    data = config.folder / "data"
    reused = _found(data, made_from)
    if not reused:
        _make_rows(config, tokenizer, ends, made_from, data)
    statistics = finished_manifest(data)["statistics"]
    tables = _make_tables(config, ends, made_from, data)
    return Prepared(data, tables, statistics | _coverage(data, tables), reused)


def _found(data: Path, made_from: dict[str, Any]) -> bool:
    old = read_manifest(data)
    if old is None:
        return False
    fields = differences(old["made_from"], made_from)
    if fields:
        print(f"prepare: {', '.join(fields)} changed since {data} was made; making it anew")
    return not fields


def _make_rows(config: RunConfig, tokenizer: Any, ends, made_from: dict[str, Any], data: Path) -> None:
    reading = room.read_conversations(config.data.source)
    taken = reading.conversations[: config.data.max_conversations or None]
    training, held_out = room.split_held_out(taken, config.data.held_out)
    with Progress(len(taken), "conversations", "prepare") as progress, atomic_folder(data) as aside:
        statistics: dict[str, Any] = {"conversations": len(taken), "duplicates": reading.duplicates}
        statistics["answers_cut_short"] = sum(conversation.truncated for conversation in taken)
        begun = 0
        for name, part in (("train", training), ("held_out", held_out)):
            rendered = _render_all(part, tokenizer, ends, config, reading, progress, begun)
            packed = room.pack(rendered, config.data.row_length)
            room.save_rows(packed.rows, aside / name)
            np.save(aside / name / "counts.npy", room.count_tokens(packed.rows, made_from["target_vocab"]))
            statistics[name] = _statistics(packed)
            begun += len(part)
        reading.check()
        lines = [json.dumps({"id": c.id, "messages": c.messages}, ensure_ascii=False) for c in held_out]
        atomic_write(aside / "held_out.jsonl", "".join(line + "\n" for line in lines))
        statistics["set_aside"] = {reason: len(where) for reason, where in reading.aside.items()}
        write_manifest(aside, {"made_from": made_from, "statistics": statistics})


def _render_all(
    part, tokenizer, ends, config: RunConfig, reading, progress: Progress, begun: int
) -> list[room.Rendered]:
    rendered = []
    for number, conversation in enumerate(part):
        try:
            rendered.append(
                room.render(
                    tokenizer,
                    conversation.messages,
                    end_token_ids=ends,
                    system_prompt=config.data.system_prompt,
                    truncated=conversation.truncated,
                    check_ids=number < CHECKED_FIRST or number % CHECKED_EVERY == 0,
                )
            )
        except room.ConversationError as error:
            reading.set_aside(str(error), f"conversation {conversation.id}")
        progress.update(begun + number + 1)
    return rendered


def _statistics(packed: room.Packed) -> dict[str, Any]:
    rows: Batch = packed.rows
    tokens = int((rows.segments_BT > 0).sum())
    return {
        "rows": int(rows.tokens_BT.shape[0]),
        "documents": int(rows.segments_BT.max(axis=1, initial=0).sum()),
        "tokens": tokens,
        "supervised_tokens": int(rows.supervised_BT.sum()),
        "fill": round(tokens / max(rows.tokens_BT.size, 1), 4),
        "truncated": packed.truncated,
        "unsupervised": packed.unsupervised,
    }


def _make_tables(config: RunConfig, ends, made_from: dict[str, Any], data: Path) -> Path:
    """A stage of its own: another --draft.vocab needs no new rendering."""
    tables = config.folder / "tables"
    wanted = {"data": fingerprint(made_from), "draft_vocab": config.draft.vocab, "end_token_ids": list(ends)}
    old = read_manifest(tables)
    if old is None or differences(old, wanted):
        counts = np.load(data / "train" / "counts.npy")
        room.save_tables(tables, counts, room.choose(counts, config.draft.vocab, ends), wanted)
    return tables


def _coverage(data: Path, tables: Path) -> dict[str, Any]:
    ids = room.load_tables(tables)
    counts = {name: np.load(data / name / "counts.npy") for name in ("train", "held_out")}
    return {"draft_vocab": len(ids)} | {f"coverage_{n}": round(room.coverage(c, ids), 4) for n, c in counts.items()}


def describe(prepared: Prepared) -> list[str]:
    """What was prepared, in a few lines."""
    s = prepared.statistics
    train, held_out = s["train"], s["held_out"]
    share = train["supervised_tokens"] / max(train["tokens"], 1)
    lines = [f"{prepared.data} is made from the same inputs: reused"] if prepared.reused else []
    lines += [
        f"data: {train['documents']} conversations in {train['rows']} rows ({train['fill']:.0%} full), "
        f"{train['tokens']:,} tokens, {share:.0%} of them answers; {held_out['documents']} held out",
        f"draft vocabulary: {s['draft_vocab']} tokens cover {s['coverage_train']:.1%} of the answers, "
        f"{s['coverage_held_out']:.1%} of held-out ones",
    ]
    if train["truncated"]:
        lines.append(f"note: {train['truncated']} conversations were cut to the row length: --data.row-length sets it")
    if train["unsupervised"]:
        lines.append(
            f"note: {train['unsupervised']} conversations have no answer within the row length and are left out"
        )
    if s["answers_cut_short"]:
        lines.append(f"note: {s['answers_cut_short']} answers are cut short: their end is not learnt")
    if s["set_aside"]:
        lines.append("set aside: " + "; ".join(f"{n} x {reason}" for reason, n in s["set_aside"].items()))
    if s["coverage_train"] < 0.95:
        lines.append("warning: the draft cannot say over 5 % of the answers: raise --draft.vocab")
    return lines
