"""`python -m tests.serve`: do engines do with a draft exactly what jeagle does with it?

A draft is trained here (or a run of yours taken, --run), decoded by jeagle from its checkpoint, and exported.

- vLLM serves it beside its target, greedily, in float32: texts, and how many drafts are accepted at each position, are
  jeagle's, prompt by prompt; and are not with a fault planted in the export.
- The speculators library loads it, and its forward gives jeagle's loss on the same row.
- SGLang's draft class loads it on a CPU: every parameter from a tensor, every tensor used, layers and RoPE as trained.

`make serve-check` installs what it needs and calls it.
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
from jeagle.runtime.outputs import check_replaceable, signed_file
from tests.serve import drafts, peers, with_vllm
from tests.serve.reference import Settings
from tests.serve.served import Layout, Served, prepare

FOUND = signed_file("file of serve-check's findings", b'"as_it_should"')
QUICKSTART = Path("runs/quickstart")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serves drafts and compares what engines do with what jeagle does."""

    run: Path | None = None
    """A run of your own, runs/NAME, instead of the drafts made here."""
    drafts: tuple[str, ...] = ("small",)
    """Which drafts are made and served; `all` for every one, and runs/quickstart where it is."""
    engines: tuple[Literal["vllm", "speculators", "sglang"], ...] = ("vllm", "speculators", "sglang")
    """Who is asked."""
    faults: tuple[Layout, ...] = ("speculators",)
    """Layouts in which faults are planted in the first draft's export: each must make vLLM's counters differ. With
    --drafts all in every layout."""
    venv: Path = Path(".venv-serve")
    """The environment that has vLLM, with folders speculators and sglang of what those need besides."""
    out: Path | None = None
    """File for the findings, JSON."""
    settings: Settings = dataclasses.field(default_factory=Settings)


def main(arguments: list[str]) -> int:
    args = tyro.cli(Arguments, args=arguments, prog="python -m tests.serve")
    if not (args.venv / "bin" / "python").is_file():
        raise UserError(f"{args.venv} has no interpreter: make serve-check installs vLLM there.")
    if args.out:
        check_replaceable(args.out, FOUND)
    prepare_host()
    found = []
    with tempfile.TemporaryDirectory(prefix="serve-check-") as work:
        for finding in findings(args, Path(work)):
            say(finding)
            found.append(finding)
    if args.out:
        atomic_write(args.out, json.dumps(found, indent=2) + "\n", FOUND)
    wrong = [finding for finding in found if not finding["as_it_should"]]
    print(f"serve-check: {len(found) - len(wrong)} of {len(found)} as they should be")
    return 1 if wrong else 0


def findings(args: Arguments, work: Path) -> Iterator[dict[str, Any]]:
    python = args.venv / "bin" / "python"
    served = [prepare(name, run, work / name, args.settings) for name, run in runs(args, work)]
    if "vllm" in args.engines:
        yield from with_vllm.check(python, served, work, faulty=faulty(args))
    for one in served:
        yield from peer_findings(args, python, one, work)


def faulty(args: Arguments) -> tuple[Layout, ...]:
    return get_args(Layout) if args.drafts == ("all",) and not args.run and args.faults else args.faults


def peer_findings(args: Arguments, python: Path, served: Served, work: Path) -> Iterator[dict[str, Any]]:
    if "speculators" in args.engines:
        yield peers.speculators(python, args.venv / "speculators", served, work)
    if "sglang" in args.engines:
        yield peers.sglang(python, args.venv / "sglang", served)


def runs(args: Arguments, work: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders; tiny drafts are trained here."""
    if args.run:
        yield args.run.resolve().name, args.run
        return
    names = tuple(drafts.CASES) if args.drafts == ("all",) else args.drafts
    unknown = set(names) - set(drafts.CASES)
    if unknown:
        raise UserError(f"There is no draft {', '.join(unknown)}: there are {', '.join(drafts.CASES)}, and all.")
    for name in names:
        yield name, drafts.make_run(drafts.CASES[name], work / name)
    if args.drafts == ("all",) and (QUICKSTART / "checkpoints").is_dir():
        yield "quickstart", QUICKSTART


def say(finding: dict[str, Any]) -> None:
    what = ", ".join(part for part in (finding["draft"], finding["layout"], finding["fault"]) if part)
    print(
        f"{'ok  ' if finding['as_it_should'] else 'FAIL'} {finding['engine']}, {what}: {finding['found']}", flush=True
    )
    if not finding["fault"]:
        for line in finding["differences"]:
            print(f"       {line}", flush=True)


if __name__ == "__main__":
    command(main)
