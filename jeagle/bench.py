"""`python -m jeagle.bench --run RUN` measures the acceptance length of a draft by speculative decoding.

It also compares each text with the target's own greedy decoding.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jeagle import decoding
from jeagle.errors import UserError
from jeagle.run import acceptance, assemble
from jeagle.runtime.cli import parse
from jeagle.runtime.cli import run as run_command
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_output, json_file
from jeagle.runtime.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Decodes prompts speculatively and reports what was accepted."""

    run: Annotated[Path, tyro.conf.arg(aliases=("--draft", "--checkpoint"))]
    """The folder of the run, runs/NAME."""
    prompts: Path | None = None
    """A jsonl file of {"turns": [...]} lines, whose first turns are asked. Default: the held-out conversations."""
    max_prompts: int = 64
    """Largest number of prompts; 0 measures all."""
    max_new_tokens: int = 64
    """Largest number of tokens in an answer."""
    draft_tokens: int = 7
    """Number of tokens in the chain that is drafted before each verification."""
    batch: int = 16
    """Number of prompts that are decoded at the same time."""
    config_list: tuple[str, ...] = ()
    """Chains and trees to measure instead of --draft-tokens and --batch, each as BATCH,STEPS,TOPK,VERIFY (as in
    SpecForge): prompts at the same time, forward passes of the draft, tokens that each of them expands (1 is a chain),
    and tokens that the target verifies at once."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0 samples from all."""
    rule: Literal["target", "rejection"] = "target"
    """How drafted tokens are judged when the temperature is above 0: against a token that the target samples (vLLM), or
    by rejection sampling of tokens that the draft samples (chains only)."""
    seed: int = 0
    """Random seed; used when the temperature is above 0."""
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
    args = parse(BenchArguments, arguments, program="python -m jeagle.bench")
    plans = read_plans(args)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be above 0.")
    if args.out:
        check_output(args.out, MEASURED)
    prepare_host()
    folder = assemble.run_folder(args.run)
    config = assemble.read_config(folder)
    if args.weights != "run":
        config = dataclasses.replace(config, target=dataclasses.replace(config.target, weights=args.weights))
    step, spec, params = assemble.load_draft(folder, args.step)
    bench = acceptance.open_bench(config, spec, folder, params, dtype=args.dtype)
    prompts = acceptance.prompt_ids(bench, config, folder, args.prompts, args.max_prompts)
    common = {"run": str(folder), "step": step, "dtype": args.dtype, "prompts": str(args.prompts)}
    common |= {"weights": config.target.weights, "seed": args.seed}
    reports = []
    for batch, how in plans:
        report, decoded = acceptance.measure(
            bench, prompts, how=how, max_new_tokens=args.max_new_tokens, batch=batch, seed=args.seed
        )
        report["baselines"] = acceptance.measure_baselines(folder, prompts, decoded, how.shape)
        reports.append(report | {"batch": batch} | common)
    whole = reports[0] | ({"measurements": reports} if len(reports) > 1 else {})
    text = json.dumps(whole, indent=2)
    print(text, flush=True)
    if args.out:
        atomic_write(args.out, text + "\n", MEASURED)


def read_plans(args: BenchArguments) -> list[tuple[int, decoding.Decoding]]:
    """The batch and the decoding of each measurement. UserError for sizes that cannot be."""
    sampling = Sampling(args.temperature, args.top_p, args.top_k)
    sizes = []
    for text in args.config_list or (f"{args.batch},{args.draft_tokens},1,{args.draft_tokens + 1}",):
        numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
        if len(numbers) != 4 or min(numbers) < 1:
            flags = "--config-list" if args.config_list else "--batch and --draft-tokens"
            raise UserError(f"{flags}: {text!r} is not BATCH,STEPS,TOPK,VERIFY, four numbers above 0.")
        sizes.append(numbers)
    return [(batch, decoding.Decoding(decoding.TreeShape(*shape), sampling, args.rule)) for batch, *shape in sizes]


if __name__ == "__main__":
    run_command(main)
