"""`python converters/from_eagle3.py DIR --out RUN`: a published draft becomes a run, to measure, export or go on from.

DIR may come from the authors of EAGLE, SpecForge, SGLang, vLLM, speculators, NVIDIA Model Optimizer, NeMo AutoModel or
jeagle. What its files leave open is measured, where --target is given, by decoding a few prompts in every reading.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import jeagle
from jeagle import data, exchange, targets
from jeagle import flags as configs
from jeagle.config import DraftConfig, RunConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.exchange import OpenDraft, Reading
from jeagle.exporting.choose_reading import Decoding, label, options, settle
from jeagle.interfaces import DraftSpec
from jeagle.run import assemble
from jeagle.run.draft_init import EMBEDDING_FILE
from jeagle.runtime.checkpoints import Checkpoints
from jeagle.runtime.cli import run, shell_word
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_folder, fingerprint
from jeagle.runtime.mesh import make_mesh
from jeagle.runtime.outputs import NEW_FOLDER, check_replaceable
from jeagle.training.step import TrainState

STEP = 0
"""The checkpoint's: nothing has been trained here."""
_ROWS = 8192  # of an embedding at a time
_PROMPTS = 256  # of those that come with jeagle, kept in the run to measure with


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Turns a published EAGLE-3 draft into a run of jeagle's."""

    source: tyro.conf.Positional[Path]
    """A folder with config.json and model.safetensors (or its parts), or pytorch_model.bin."""
    out: Path
    """The run's folder to write, runs/NAME."""
    target: str = ""
    """The model that the draft is for: a folder, a hub id, or pypi:NAME==VERSION. It settles what the files leave
    open, and is needed to measure or export the draft."""
    aux_layers: tuple[int, ...] = ()
    """After how many layers the target is tapped: L means after L layers. Overrules the files."""
    norm_output: Literal["head", "carry"] | None = None
    """What norm_output in config.json means: the norm before lm_head (SpecForge), or of the carried state."""
    norm_before_residual: bool | None = None
    """Whether the residual is the normed feature, where config.json is silent."""
    prompts: Path | None = None
    """A jsonl file of {"turns": [...]} lines to measure with; default: prompts that come with jeagle."""
    max_prompts: int = 8
    """Measure with only the first so many prompts."""
    max_new_tokens: int = 48
    """Tokens of each answer."""
    draft_tokens: int = 5
    """Tokens drafted before each verification."""
    family: str = ""
    """package.module:NAME of a Family that describes a target of your own: docs/adding_a_target.md."""


def main(arguments: list[str]) -> None:
    """The command converters/from_eagle3.py."""
    args = tyro.cli(Arguments, args=arguments, prog="from_eagle3.py", config=(tyro.conf.FlagConversionOff,))
    prepare_host()
    for line in take_in(args):
        print(line)


def take_in(args: Arguments) -> list[str]:
    """Writes the run; returns what to say.

    Raises:
      UserError: for a folder that is no draft, an open question that nothing answers, a target that the draft is not
        for, or a place that is taken. Nothing is left behind then.
    """
    check_replaceable(args.out, NEW_FOLDER)
    draft = exchange.open_draft(args.source)
    files = targets.resolve(args.target) if args.target else None
    hints = exchange.Hints(args.aux_layers or None, args.norm_output, args.norm_before_residual)
    known = _known(args, files) if files else None
    readings = exchange.readings(draft, hints, known.layers if known else None)
    spec = readings[0].spec
    if known:
        _check_target(args, spec, known)
    elif len(readings) > 1:
        raise UserError(_question(draft, readings))
    if draft.lacks_head and files:
        draft = draft.with_head(_targets_head(args, files, spec, draft.draft_to_target(spec)))
    params = {name: parameter[...] for name, parameter in draft.params(spec).items()}
    with atomic_folder(args.out, NEW_FOLDER) as folder:
        _write_tables(folder, draft, spec)
        _describe(folder, args, spec, files)
        lines: list[str] = []
        how = Decoding(args.prompts, args.max_prompts, args.max_new_tokens, args.draft_tokens)
        if files:
            spec, lines = settle(_config(args, spec), how, folder, readings, params, step=STEP)
            _describe(folder, args, spec, files)
        _save(folder, spec, params)
    return [*lines, *_what_next(args, spec)]


def _known(args: Arguments, files: targets.TargetFiles) -> targets.TargetSpec:
    family = targets.own_family(args.family) if args.family else None
    return targets.read_spec(targets.open_weights(files).config, family)


def _check_target(args: Arguments, spec: DraftSpec, target: targets.TargetSpec) -> None:
    if (spec.target_width, spec.target_vocab) != (target.width, target.vocab):
        raise UserError(
            f"{args.source} is for a target of width {spec.target_width} and vocabulary {spec.target_vocab}; "
            f"{args.target} has {target.width} and {target.vocab}: give --target the model that it was made for."
        )


def _targets_head(args: Arguments, files: targets.TargetFiles, spec: DraftSpec, ids_D: np.ndarray) -> np.ndarray:
    """The rows of the target's lm_head for the draft's vocabulary, float32 [D, W]."""
    if spec.width != spec.target_width:
        raise UserError(
            f"{args.source} lacks lm_head.weight, and a draft of width {spec.width} cannot share that of a target of "
            f"width {spec.target_width}."
        )
    family = targets.own_family(args.family) if args.family else None
    table = targets.head_table(targets.open_weights(files), family)
    head_DW = np.empty((len(ids_D), spec.width), np.float32)
    for start in range(0, spec.target_vocab, _ROWS):
        first, last = np.searchsorted(ids_D, (start, start + _ROWS))
        head_DW[first:last] = table[start : start + _ROWS][ids_D[first:last] - start]
    return head_DW


def _config(args: Arguments, spec: DraftSpec) -> RunConfig:
    """The run's settings: those that a command which opens the run goes by."""
    return RunConfig(
        name=args.out.name,
        runs=str(args.out.parent),
        target=TargetConfig(ref=args.target, aux_layers=spec.aux_layers, family=args.family),
        draft=DraftConfig(vocab=_vocab_flag(spec)),
    )


def _write_tables(folder: Path, draft: OpenDraft, spec: DraftSpec) -> None:
    """The vocabulary's map, the embedding where the draft brings one, and prompts to measure it with."""
    ids, embedding = draft.draft_to_target(spec), draft.open_embedding(spec)
    made_from = {"given": fingerprint(ids.tolist())}
    data.save_tables(folder / "tables", np.zeros(spec.target_vocab, np.int64), ids, made_from)
    if embedding is not None:
        _save_rows(folder / EMBEDDING_FILE, embedding)
    (folder / "data").mkdir()
    rows = [json.dumps({"turns": [p["messages"][0]["content"]]}) for p in data.read_prompts("starter")[:_PROMPTS]]
    (folder / "data" / "held_out.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


def _save_rows(path: Path, rows: exchange.Lazy) -> None:
    """An .npy file, float32, of rows that are read block by block."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, rows.shape)
    for start in range(0, rows.shape[0], _ROWS):
        file[start : start + _ROWS] = rows[start : start + _ROWS]
    file.flush()


def _describe(folder: Path, args: Arguments, spec: DraftSpec, files: targets.TargetFiles | None) -> None:
    """config.json and draft.json, as training writes them."""
    made_from = {
        "target": files.fingerprint if files else None,
        "data": {"imported": str(args.source), "version": jeagle.__version__},
        "tables": json.loads((folder / "tables" / "manifest.json").read_text("utf-8")),
    }
    config = configs.to_json(_config(args, spec))
    for name, tree in {"config.json": config, "draft.json": {"draft": spec.to_json(), "made_from": made_from}}.items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def _save(folder: Path, spec: DraftSpec, params: dict[str, np.ndarray]) -> None:
    _, state = assemble.draft_from_flat(spec, "float32", params, make_mesh())
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(STEP, TrainState(state, None, np.int32(STEP), np.int32(0)))
    checkpoints.close()


def _question(draft: OpenDraft, readings: list[Reading]) -> str:
    return (
        f"{draft.where} can be read in {len(readings)} ways ({'; or '.join(label(r) for r in readings)}): say which "
        f"with {options(readings[0])}, or give --target to have each of them measured."
    )


def _what_next(args: Arguments, spec: DraftSpec) -> list[str]:
    size = sum(int(np.prod(shape)) for shape in exchange.expected_shapes(spec).values())
    run = shell_word(args.out)
    target = "" if args.target else " --target TARGET"
    lines = [
        f"{args.out}: {size:,} parameters, vocabulary of {spec.draft_vocab:,} of {spec.target_vocab:,}, taps after "
        f"{' '.join(map(str, spec.aux_layers))} layers",
        f"export: python converters/to_sglang.py --checkpoint {run}{target}    (or to_vllm.py)",
        f"train on: python -m jeagle.train --config CONFIG --draft.start {run} --draft.vocab {_vocab_flag(spec)}",
    ]
    return lines + ([f"measure: python -m jeagle.bench --draft {run}"] if args.target else [])


def _vocab_flag(spec: DraftSpec) -> int:
    return spec.draft_vocab if spec.draft_vocab < spec.target_vocab else 0


if __name__ == "__main__":
    run(main)
