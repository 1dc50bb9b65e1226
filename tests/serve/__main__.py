"""`python -m tests.serve` checks that engines do exactly what jeagle does with a draft.

A draft is trained here (or --run names a run of yours), decoded by jeagle from its checkpoint, and exported.

- vLLM serves it beside its target, greedily and in float32. The texts, and the number of tokens accepted at each
  position, must be jeagle's for every prompt, and must differ from them when a fault is planted in the export.
- The speculators library loads it, and its forward pass gives jeagle's loss on the same row.
- SGLang's draft class loads it on a CPU: every parameter comes from a tensor, every tensor is used, and aux layers and
  RoPE are those of training.

`make serve-check` installs what this needs and runs it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from jeagle.errors import UserError
from jeagle.runtime.cli import run as command
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_output, signed_file
from tests.serve import drafts, peers, with_vllm
from tests.serve.reference import Settings
from tests.serve.served import Layout, Served, prepare

FINDINGS_FILE = signed_file("file of serve-check's findings", b'"as_it_should"')
QUICKSTART = Path("runs/quickstart")


@dataclasses.dataclass(frozen=True)
class ServeCheckArguments:
    """Serves drafts, and compares what engines do with what jeagle does."""

    run: Path | None = None
    """A run of your own, runs/NAME, instead of the drafts made here."""
    drafts: tuple[str, ...] = ("small",)
    """The drafts that are trained and served; `all` means every one, and runs/quickstart if it exists."""
    engines: tuple[Literal["vllm", "speculators", "sglang"], ...] = ("vllm", "speculators", "sglang")
    """The engines that are checked."""
    faults: tuple[Layout, ...] = ("speculators",)
    """The layouts in which faults are planted in the first draft's export. Each fault must change vLLM's counters. With
    --drafts all, faults are planted in every layout."""
    venv: Path = Path(".venv-serve")
    """The environment of vLLM, with the further packages of speculators and sglang in folders of these names."""
    out: Path | None = None
    """A JSON file for the findings."""
    settings: Settings = dataclasses.field(default_factory=Settings)


def main(arguments: list[str]) -> int:
    args = tyro.cli(ServeCheckArguments, args=arguments, prog="python -m tests.serve")
    if not (args.venv / "bin" / "python").is_file():
        raise UserError(f"{args.venv} has no Python interpreter: make serve-check installs vLLM there.")
    if args.out:
        check_output(args.out, FINDINGS_FILE)
    prepare_host()
    found = []
    with tempfile.TemporaryDirectory(prefix="serve-check-") as work:
        for finding in findings(args, Path(work)):
            print_finding(finding)
            found.append(finding)
    if args.out:
        atomic_write(args.out, json.dumps(found, indent=2) + "\n", FINDINGS_FILE)
    wrong = [finding for finding in found if not finding["as_it_should"]]
    print(f"serve-check: {len(found) - len(wrong)} of {len(found)} as expected")
    return 1 if wrong else 0


def findings(args: ServeCheckArguments, work: Path) -> Iterator[dict[str, Any]]:
    python = args.venv / "bin" / "python"
    served = [prepare(name, run, work / name, args.settings) for name, run in runs(args, work)]
    if "vllm" in args.engines:
        yield from with_vllm.check(python, served, work, faulty=faulty(args))
    for one in served:
        yield from peer_findings(args, python, one, work)


def faulty(args: ServeCheckArguments) -> tuple[Layout, ...]:
    return get_args(Layout) if args.drafts == ("all",) and not args.run and args.faults else args.faults


def peer_findings(args: ServeCheckArguments, python: Path, served: Served, work: Path) -> Iterator[dict[str, Any]]:
    if "speculators" in args.engines:
        yield peers.speculators(python, args.venv / "speculators", served, work)
    if "sglang" in args.engines:
        yield peers.sglang(python, args.venv / "sglang", served)


def runs(args: ServeCheckArguments, work: Path) -> Iterator[tuple[str, Path]]:
    """Yields the names and folders of the runs; tiny drafts are trained here."""
    if args.run:
        yield args.run.resolve().name, args.run
        return
    names = tuple(drafts.CASES) if args.drafts == ("all",) else args.drafts
    unknown = set(names) - set(drafts.CASES)
    if unknown:
        raise UserError(f"There is no draft {', '.join(unknown)}: choose from {', '.join(drafts.CASES)}, and all.")
    for name in names:
        yield name, drafts.make_run(drafts.CASES[name], work / name)
    if args.drafts == ("all",) and (QUICKSTART / "checkpoints").is_dir():
        yield "quickstart", QUICKSTART


def print_finding(finding: dict[str, Any]) -> None:
    what = ", ".join(part for part in (finding["draft"], finding["layout"], finding["fault"]) if part)
    print(
        f"{'ok  ' if finding['as_it_should'] else 'FAIL'} {finding['engine']}, {what}: {finding['found']}", flush=True
    )
    if not finding["fault"]:
        for line in finding["differences"]:
            print(f"       {line}", flush=True)


if __name__ == "__main__":
    command(main)
