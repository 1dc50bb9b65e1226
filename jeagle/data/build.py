"""A source -> packed rows on disk, with what is known of them. Only a few conversations are in memory at a time."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jeagle.data.answers import ConversationError
from jeagle.data.conversations import Conversation, Reading, is_held_out, read_source
from jeagle.data.near_duplicates import NearDocuments, document_signatures
from jeagle.data.render import Rendered, Renderer
from jeagle.data.sources import Part
from jeagle.data.split_writer import RowSet, Shape
from jeagle.data.texts import Rules
from jeagle.errors import UserError
from jeagle.runtime.ahead import read_ahead
from jeagle.runtime.outputs import json_file, marked_folder

CHECKED_FIRST, CHECKED_EVERY = 200, 100  # which conversations' ids are compared with apply_chat_template's
LEAST_LEARNT = 0.95  # fewer documents than this share with anything to learn stop the work
RENDERING = 2  # threads that render
_CHUNK = 256  # conversations rendered together
_T = TypeVar("_T")

_FILES = ("train", "held_out", "held_out.jsonl", "set_aside.jsonl", "tokenizer.json")
_MANIFEST = json_file("manifest of rows", "made_from", "statistics")
ROWS = marked_folder("folder of rows that jeagle prepared", "manifest.json", _MANIFEST, _FILES)


def build(
    parts: Sequence[Part],
    tokenizer: Any,
    rules: Rules,
    shape: Shape,
    folder: Path,
    on_done: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes train/, held_out/, held_out.jsonl and set_aside.jsonl into `folder`; returns the statistics.

    Raises:
      UserError: when the source cannot be read, too much of it cannot be used, or nothing in it can be learnt.
    """
    statistics, near = collections.Counter(), NearDocuments(drop=shape.near_duplicates == "drop")
    with (
        open(folder / "set_aside.jsonl", "w", encoding="utf-8") as log,
        open(folder / "held_out.jsonl", "w", encoding="utf-8") as prompts,
        RowSet(folder / "train", shape) as train,
        RowSet(folder / "held_out", shape) as measured,
    ):
        reading = Reading(log=log, limit=shape.bad_share)
        every = read_source(parts, reading, streaming=shape.streaming)
        taken = itertools.islice(every, shape.max_conversations or None)
        for conversation, held_out, found, signature in _render_all(taken, Renderer(tokenizer, rules), shape.held_out):
            statistics["conversations"] += 1
            on_done(statistics["conversations"])
            if isinstance(found, ConversationError):
                reading.refuse(str(found), conversation.where)
                continue
            reading.rendered += 1
            if near.add(signature, held_out) and near.drop:
                continue
            if held_out:
                prompts.write(_prompt_line(conversation, tokenizer, rules))
            statistics.update(_facts(conversation, found, shape))
            (measured if held_out else train).add(found, conversation)
        reading.check()
        if not statistics["conversations"]:
            labels = ", ".join(part.label for part in parts)
            raise UserError(f"{labels} holds no conversations: give a file with messages in each row.")
        named = {"train": train.finish(), "held_out": measured.finish()}
    _check_learnt(named, shape)
    counted = near.count()
    statistics["conversations"] -= counted["near_dropped"]
    return _whole(statistics, reading) | counted | named


def _facts(conversation: Conversation, documents: Sequence[Rendered], shape: Shape) -> dict[str, int]:
    return {
        "answers_cut_short": int(conversation.truncated),
        "taken_apart": int(len(documents) > 1),
        "on_policy": int(is_of(conversation.model, shape.target)),
        "known_model": int(bool(conversation.model)),
    }


def is_of(model: str, target: Sequence[str]) -> bool:
    """Whether `model` is one of the target's names, letters' case and owner left out."""
    return bool(model) and _short(model) in {_short(name) for name in target if name}


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower().partition("==")[0]


def _whole(statistics: collections.Counter, reading: Reading) -> dict[str, Any]:
    columns = [f"{label}: {columns}" for label, columns in reading.columns]
    names = ("conversations", "answers_cut_short", "taken_apart", "on_policy", "known_model")
    return {name: int(statistics[name]) for name in names} | {
        "read": reading.lines,
        "duplicates": reading.duplicates,
        "set_aside": dict(reading.counts),
        "notes": dict(reading.notes),
        "columns": columns,
    }


def _check_learnt(named: dict[str, dict[str, Any]], shape: Shape) -> None:
    if not named["train"]["documents"] and named["held_out"]["documents"]:
        raise UserError(
            f"All {named['held_out']['documents']} conversations are held out, and none is left to train on: lower "
            f"--data.held-out from {shape.held_out}, or give more."
        )
    lost = sum(side["unsupervised"] + side["dropped"] for side in named.values())
    all_of_them = lost + sum(side["documents"] for side in named.values())
    if lost > (1 - LEAST_LEARNT) * all_of_them:
        p95 = max(side["lengths"]["p95"] for side in named.values())
        raise UserError(
            f"{lost} of {all_of_them} conversations have no answer within --data.row-length {shape.row_length} (95 % "
            f"are at most {p95} tokens long): raise it, or continue long ones with --data.long split."
        )


def _prompt_line(conversation: Conversation, tokenizer: Any, rules: Rules) -> str:
    line: dict[str, Any] = {"id": conversation.id, "messages": conversation.messages}
    if conversation.tools:
        line["tools"] = conversation.tools
    if "thinking" in str(tokenizer.chat_template):
        first = [m for m in conversation.messages if m["role"] == "assistant"][:1]
        line["thinking"] = rules.thinks(first) and rules.reasoning == "keep"
    return json.dumps(line, ensure_ascii=False) + "\n"


def _render_all(
    conversations: Iterable[Conversation], renderer: Renderer, share: float
) -> Iterator[tuple[Conversation, bool, list[Rendered] | ConversationError, np.ndarray]]:
    """(conversation, held out, its documents or what is wrong, a signature of what its turns say), in order.

    Rendered on threads while more are read.
    """
    numbers = {True: itertools.count(), False: itertools.count()}

    def with_checks(chunk: list[tuple[Conversation, bool]]) -> tuple[list[tuple[Conversation, bool]], list[bool]]:
        counted = [next(numbers[held_out]) for _, held_out in chunk]
        return chunk, [number < CHECKED_FIRST or number % CHECKED_EVERY == 0 for number in counted]

    def render(work: tuple[list[tuple[Conversation, bool]], list[bool]]) -> list[tuple]:
        chunk, check = work
        found = renderer([conversation for conversation, _ in chunk], check)
        signed = document_signatures([_turns(documents) for documents in found])
        return [(*pair, documents, mine) for pair, documents, mine in zip(chunk, found, signed, strict=True)]

    pairs = ((c, is_held_out(c, share)) for c in conversations)
    work = map(with_checks, _chunks(pairs, _CHUNK))
    # One chunk's texts are made in Python while another's are tokenised outside of it.
    for found in read_ahead(work, render, threads=RENDERING, depth=RENDERING + 1):
        yield from found


def _turns(found: list[Rendered] | ConversationError) -> np.ndarray:
    """The token ids of a conversation's last document, without the system's turn and the tools, which many share."""
    return np.zeros(0, np.int32) if isinstance(found, ConversationError) else found[-1].ids[found[-1].lead :]


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
