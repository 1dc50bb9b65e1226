"""`python -m jeagle.bench --run RUN` measures the acceptance length of a draft by speculative decoding.

It also compares each text with the target's own greedy decoding.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jeagle.errors import UserError
from jeagle.run import acceptance, assemble
from jeagle.runtime.cli import run as run_command
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_replaceable, json_file


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Decodes prompts speculatively (a chain of drafted tokens, temperature 0) and reports what was accepted."""

    run: Annotated[Path, tyro.conf.arg(aliases=("--draft", "--checkpoint"))]
    """The folder of the run, runs/NAME."""
    prompts: Path | None = None
    """A jsonl file of {"turns": [...]} lines, whose first turns are asked. Default: the held-out conversations."""
    max_prompts: int = 64
    """Largest number of prompts; 0 measures all."""
    max_new_tokens: int = 64
    """Largest number of tokens in an answer."""
    draft_tokens: int = 7
    """Number of tokens that are drafted before each verification."""
    batch: int = 16
    """Number of prompts that are decoded at the same time."""
    step: str = "last"
    """Step of the checkpoint, or last, or best: the saved checkpoint with the best held-out metrics."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products of both models."""
    weights: Literal["run", "dtype", "int8", "fp8"] = "run"
    """How the target's kernels are stored in memory; run takes the run's own setting."""
    out: Path | None = None
    """JSON file for the report."""


MEASURED = json_file("measurement of jeagle.bench's", "acceptance_length", "prompts_measured")


def main(arguments: list[str]) -> None:
    args = tyro.cli(BenchArguments, args=arguments, prog="python -m jeagle.bench")
    for name in ("max_new_tokens", "draft_tokens", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0.")
    if args.out:
        check_replaceable(args.out, MEASURED)
    prepare_host()
    folder = assemble.run_folder(args.run)
    config = assemble.read_config(folder)
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
    run_command(main)
