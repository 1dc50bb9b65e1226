"""`python -m jeagle.bench --draft RUN`: acceptance length by really decoding, and whether the text is the target's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import tyro

from jeagle.config import from_json
from jeagle.errors import UserError
from jeagle.run import acceptance, assemble
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_replaceable, json_file


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Decodes prompts speculatively (chain, temperature 0) and reports what was accepted."""

    draft: Path
    """The run's folder, runs/NAME."""
    prompts: Path | None = None
    """A jsonl file of {"turns": [...]} lines (the first turn is asked); default: the run's held-out conversations."""
    max_prompts: int = 64
    """Measure only the first so many prompts; 0 measures all."""
    max_new_tokens: int = 64
    """Tokens of each answer."""
    draft_tokens: int = 7
    """Tokens drafted before each verification."""
    batch: int = 16
    """Prompts decoded side by side."""
    step: str = "last"
    """Checkpoint step, last, or best: the one with the best held-out figures of those that are kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of both models' matrix products."""
    weights: Literal["run", "dtype", "int8", "fp8"] = "run"
    """How the target's kernels are kept in memory; run: as the run's own configuration says."""
    out: Path | None = None
    """File for the report, JSON."""


MEASURED = json_file("measurement of jeagle.bench's", "acceptance_length", "prompts_measured")


def main(arguments: list[str]) -> None:
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.bench")
    for name in ("max_new_tokens", "draft_tokens", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0.")
    if args.out:
        check_replaceable(args.out, MEASURED)
    prepare_host()
    folder = assemble.run_folder(args.draft)
    config = from_json(json.loads((folder / "config.json").read_text()))
    if args.weights != "run":
        config = dataclasses.replace(config, target=dataclasses.replace(config.target, weights=args.weights))
    step, spec, params = assemble.load_draft(folder, args.step)
    bench = acceptance.open_bench(config, spec, folder, params, dtype=args.dtype)
    prompts = acceptance.prompt_ids(bench, config, folder, args.prompts, args.max_prompts)
    settings = {n: getattr(args, n) for n in ("max_new_tokens", "draft_tokens", "batch")}
    report, _ = acceptance.measure(bench, prompts, **settings)
    report |= {"run": str(folder), "step": step, "dtype": args.dtype, "temperature": 0, "prompts": str(args.prompts)}
    text = json.dumps(report | {"weights": config.target.weights}, indent=2)
    if args.out:
        atomic_write(args.out, text + "\n", MEASURED)
    print(text)


if __name__ == "__main__":
    run(main)
