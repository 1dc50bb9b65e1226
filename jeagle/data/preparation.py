"""Turns a source into packed rows on disk, with statistics. Only a few conversations are in memory at a time."""

import collections
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.config import DataConfig
from jeagle.data.chat.render import Rendered, Renderer
from jeagle.data.chat.templates import ConversationError
from jeagle.data.near_duplicates import NearDuplicateIndex, document_signatures
from jeagle.data.rows import Packer, RowWriter, rows_of
from jeagle.data.sources.catalog import SourcePart
from jeagle.data.sources.conversations import Conversation, SourceReport, is_held_out, read_source
from jeagle.data.sources.schema import ANSWERING
from jeagle.data.vocabulary import count_supervised
from jeagle.errors import UserError
from jeagle.runtime.ahead import read_ahead
from jeagle.runtime.outputs import json_file, marked_folder

RENDERING_THREADS = 2
_CHECKED_FIRST, _CHECKED_EVERY = 200, 100  # which conversations' ids are compared with those of apply_chat_template
_LEAST_SUPERVISED = 0.95  # the work stops if a smaller share of the documents has a supervised token
_CHUNK = 256  # conversations that are rendered together
_ROWS = 64  # rows that are written together

# Older versions of jeagle call rejected.jsonl set_aside.jsonl.
_FILES = ("train", "held_out", "held_out.jsonl", "rejected.jsonl", "set_aside.jsonl", "tokenizer.json")
_MANIFEST = json_file("manifest of rows", "made_from", "statistics")
ROWS = marked_folder("folder of rows that jeagle prepared", "manifest.json", _MANIFEST, _FILES)


def prepare_rows(
    parts: Sequence[SourcePart],
    tokenizer: Any,
    config: DataConfig,
    folder: Path,
    *,
    end_token_ids: Sequence[int],
    vocab: int,
    target: str = "",
    on_done: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes train/, held_out/, held_out.jsonl and rejected.jsonl into `folder`, and returns the statistics.

    Args:
      end_token_ids: ids that may end an answer.
      vocab: V, size of the target's vocabulary.
      target: the target's name, which tells its own answers from those of other models.
      on_done: called with the number of conversations so far.

    Raises:
      UserError: if the source cannot be read, if too much of it is rejected, or if no token of it is supervised.
    """
    counts, near = collections.Counter(), NearDuplicateIndex(drop=config.near_duplicates == "drop")
    with (
        open(folder / "rejected.jsonl", "w", encoding="utf-8") as log,
        open(folder / "held_out.jsonl", "w", encoding="utf-8") as prompts,
        SplitWriter(folder / "train", config, vocab) as train,
        SplitWriter(folder / "held_out", config, vocab) as evaluation,
    ):
        report = SourceReport(log=log, bad_share=config.bad_share)
        conversations = read_source(parts, report, streaming=config.streaming)
        used = itertools.islice(conversations, config.max_conversations or None)
        renderer = Renderer(tokenizer, config, end_token_ids)
        for conversation, held_out, documents, signature in _render_all(used, renderer, config.held_out):
            counts["conversations"] += 1
            on_done(counts["conversations"])
            documents = _checked(documents, vocab)
            if isinstance(documents, ConversationError):
                report.reject_not_rendered(str(documents), conversation.where)
                continue
            report.rendered += 1
            if near.add(signature, held_out) and near.drop:
                continue
            if held_out:
                prompts.write(_prompt_line(conversation, tokenizer, renderer))
            counts["answers_cut_short"] += sum(m.get("cut", False) for m in conversation.messages)
            counts["taken_apart"] += len(documents) > 1
            counts["on_policy"] += is_same_model(conversation.model, target)
            counts["known_model"] += bool(conversation.model)
            (evaluation if held_out else train).add(documents, conversation)
        report.check()
        if not counts["conversations"]:
            labels = ", ".join(part.label for part in parts)
            raise UserError(f"{labels} contains no conversations: give a file with messages in each row.")
        splits = {"train": train.finish(), "held_out": evaluation.finish()}
    _check_supervised(splits, config)
    near_counts = near.count()
    counts["conversations"] -= near_counts["near_dropped"]
    names = ("conversations", "answers_cut_short", "taken_apart", "on_policy", "known_model")
    read = {
        "read": report.rows,
        "duplicates": report.duplicates,
        "rejected": dict(report.rejected),
        "notes": dict(report.notes),
        "columns": [f"{label}: {columns}" for label, columns in report.columns],
        "unused": report.unused_columns(),
    }
    return {name: int(counts[name]) for name in names} | read | near_counts | splits


class SplitWriter(RowWriter):
    """Writes the rows of one side of the split to disk as documents arrive, and collects their statistics."""

    def __init__(self, folder: Path, config: DataConfig, vocab: int):
        super().__init__(folder, config.row_length)
        self._folder, self._vocab, self._packer = folder, vocab, Packer(config.row_length, config.long)
        self._closed: list[list[Rendered]] = []  # the documents of rows that are full but not yet written
        self._counts = np.zeros(vocab, np.int64)
        self._lengths, self._answers = collections.Counter(), collections.Counter()
        self._tokens = self._documents = 0

    def add(self, documents: Sequence[Rendered], conversation: Conversation) -> None:
        """Packs the documents of one conversation."""
        self._answers[sum(m["role"] in ANSWERING for m in conversation.messages)] += 1
        for document in documents:
            self._lengths[len(document.ids)] += 1
            self._closed += self._packer.add(document)
        if len(self._closed) >= _ROWS:
            self._write_closed()

    def finish(self) -> dict[str, Any]:
        """Writes the remaining rows and counts.npy, and returns the statistics."""
        self._closed += self._packer.finish()
        self._write_closed()
        np.save(self._folder / "counts.npy", self._counts)
        size = self.rows * self.row_length
        return {
            "rows": self.rows,
            "documents": self._documents,
            "tokens": self._tokens,
            "supervised_tokens": int(self._counts.sum()),
            "fill": round(self._tokens / max(size, 1), 4),
            **{name: getattr(self._packer, name) for name in ("truncated", "split", "dropped", "unsupervised")},
            "lengths": _quantiles(self._lengths),
            "answers": _quantiles(self._answers),
        }

    def _write_closed(self) -> None:
        for start in range(0, len(self._closed), _ROWS):
            rows = rows_of(self._closed[start : start + _ROWS], self.row_length)
            self._counts += count_supervised(rows, self._vocab)
            self._tokens += int((rows.segments_BT > 0).sum())
            self._documents += int(rows.segments_BT.max(axis=1, initial=0).sum())
            self.write(rows)
        self._closed = []


def _checked(documents: list[Rendered] | ConversationError, vocab: int) -> list[Rendered] | ConversationError:
    """Returns the documents, or an error if the target has no embedding for one of their ids."""
    if isinstance(documents, ConversationError):
        return documents
    largest = max(int(document.ids.max(initial=0)) for document in documents)
    if largest < vocab:
        return documents
    return ConversationError(f"token id {largest} is beyond the {vocab} ids of the target's embedding")


def is_same_model(model: str, other: str) -> bool:
    """Whether two names mean the same model, regardless of case, owner and version; an empty name means none."""
    bases = {name.rstrip("/").rpartition("/")[2].lower().partition("==")[0] for name in (model, other)}
    return bool(model and other) and len(bases) == 1


def _check_supervised(splits: dict[str, dict[str, Any]], config: DataConfig) -> None:
    if not splits["train"]["documents"] and splits["held_out"]["documents"]:
        raise UserError(
            f"All {splits['held_out']['documents']} conversations are held out, and none remains to train on: lower "
            f"--data.held-out from {config.held_out}, or give more conversations."
        )
    lost = sum(split["unsupervised"] + split["dropped"] for split in splits.values())
    total = lost + sum(split["documents"] for split in splits.values())
    if lost > (1 - _LEAST_SUPERVISED) * total:
        p95 = max(split["lengths"]["p95"] for split in splits.values())
        raise UserError(
            f"{lost} of {total} conversations have no answer within --data.row-length {config.row_length} (95 % are "
            f"at most {p95} tokens long): raise it, or continue long conversations with --data.long split."
        )


def _prompt_line(conversation: Conversation, tokenizer: Any, renderer: Renderer) -> str:
    line: dict[str, Any] = {"id": conversation.id, "messages": conversation.messages}
    if conversation.tools:
        line["tools"] = conversation.tools
    if "thinking" in str(tokenizer.chat_template) and conversation.messages[0]["role"] not in ("text", "ids"):
        line["thinking"] = renderer.thinks(conversation)
    return json.dumps(line, ensure_ascii=False) + "\n"


def _render_all(
    conversations: Iterator[Conversation], renderer: Renderer, share: float
) -> Iterator[tuple[Conversation, bool, list[Rendered] | ConversationError, np.ndarray]]:
    """Yields (conversation, whether it is held out, its documents or an error, its MinHash signature), in order.

    Threads render while more conversations are read.
    """
    numbers = {True: itertools.count(), False: itertools.count()}

    def chunks() -> Iterator[tuple[list[Conversation], list[bool], list[bool]]]:
        while chunk := list(itertools.islice(conversations, _CHUNK)):
            sides = [is_held_out(conversation, share) for conversation in chunk]
            counted = [next(numbers[side]) for side in sides]
            yield chunk, sides, [number < _CHECKED_FIRST or number % _CHECKED_EVERY == 0 for number in counted]

    def render(work: tuple[list[Conversation], list[bool], list[bool]]) -> list[tuple]:
        chunk, sides, check = work
        rendered = renderer(chunk, check)
        # Signatures leave out the system turn and the tools, which many conversations share.
        turns = [[] if isinstance(d, ConversationError) else d[-1].ids[d[-1].lead :] for d in rendered]
        signatures = document_signatures([np.asarray(ids, np.int32) for ids in turns])
        return list(zip(chunk, sides, rendered, signatures, strict=True))

    # Templates run in Python for one chunk while another chunk is tokenised outside of Python.
    for rendered in read_ahead(chunks(), render, threads=RENDERING_THREADS, depth=RENDERING_THREADS + 1):
        yield from rendered


def _quantiles(counter: collections.Counter) -> dict[str, Any]:
    """Returns the mean, the median, the 95th percentile and the maximum of counted numbers."""
    if not counter:
        return {"mean": 0, "p50": 0, "p95": 0, "max": 0}
    values, counts = np.array(sorted(counter.items())).T
    p50, p95 = np.percentile(values, (50, 95), weights=counts, method="inverted_cdf").tolist()
    mean = float((values * counts).sum() / counts.sum())
    return {"mean": round(mean, 2), "p50": int(p50), "p95": int(p95), "max": int(values[-1])}
