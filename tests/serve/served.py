"""Prepares a draft for engines: decodes it with jeagle, exports it, and writes its target as engines read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

from jeagle.config import from_json
from jeagle.errors import UserError
from jeagle.export import ExportArguments, VllmExportArguments, export
from tests.serve import reference
from tests.serve.check import why_uninformative
from tests.serve.float32_target import write_float32

Layout = Literal["speculators", "plain"]


class Served(NamedTuple):
    """What an engine is given, and how jeagle decodes it.

    Attributes:
      run: the folder that the draft was trained in.
      target: its target, float32.
      exports: of the draft for vLLM, by layout.
      sglang: the export for SGLang, or jeagle's message why SGLang cannot serve it.
    """

    name: str
    run: Path
    reference: reference.Reference
    target: Path
    exports: dict[Layout, Path]
    sglang: Path | str


def prepare(name: str, run: Path, work: Path, settings: reference.Settings) -> Served:
    """Decodes with the run's checkpoint, and writes its target and its exports in float32 under `work`.

    Raises:
      UserError: for a draft that is accepted so rarely or so often that equal counters would prove nothing.
    """
    config = from_json(json.loads((run / "config.json").read_text()))
    decoded = reference.decode(run, settings)
    reason = why_uninformative(decoded.counted())
    if reason:
        raise UserError(f"{name}: {reason}. Train it longer, or give more prompts.")
    exports: dict[Layout, Path] = {"speculators": work / "exports" / "vllm", "plain": work / "exports" / "plain"}
    for layout, out in exports.items():
        args = VllmExportArguments(str(run), out, dtype="float32", layout=layout)
        print(f"{name}: {export(args)}", flush=True)
    target = write_float32(config.target.ref, work / "float32")
    return Served(name, run, decoded, target, exports, for_sglang(run, work / "exports" / "sglang"))


def for_sglang(run: Path, out: Path) -> Path | str:
    try:
        export(ExportArguments(str(run), out, dtype="float32"))
    except UserError as refused:
        return str(refused)
    return out
