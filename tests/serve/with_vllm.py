"""Compares what vLLM and jeagle accept of the same drafts, with and without faults."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.errors import UserError
from tests.serve import faults
from tests.serve.check import differences
from tests.serve.served import Layout, Served

PROGRAM = Path(__file__).with_name("in_vllm.py")


class Trial(NamedTuple):
    """One start of vLLM."""

    served: Served
    layout: Layout
    fault: str
    folder: Path


def check(python: Path, served: list[Served], work: Path, *, faulty: Sequence[Layout]) -> Iterator[dict[str, Any]]:
    """Yields a finding for each draft in each layout, and for each fault of the first draft in the layouts `faulty`."""
    trials = [Trial(one, layout, "", folder) for one in served for layout, folder in one.exports.items()]
    for layout in faulty:
        trials += planted(served[0], layout, work / "faults" / layout)
    for trial, answer in zip(trials, answers(python, trials, work), strict=True):
        yield judged(trial, answer)


def planted(served: Served, layout: Layout, work: Path) -> Iterator[Trial]:
    """Yields copies of an export, each with one fault that this draft can have."""
    for fault in faults.FAULTS:
        out = work / fault.replace(" ", "_")
        if faults.plant(fault, served.exports[layout], out):
            yield Trial(served, layout, fault, out)
        else:
            print(f"{served.name}: {fault} cannot be planted in this draft", flush=True)


def answers(python: Path, trials: list[Trial], work: Path) -> Iterator[dict[str, Any]]:
    """Yields vLLM's answers as they arrive."""
    jobs, log = work / "jobs.jsonl", work / "vllm.log"
    jobs.write_text("".join(json.dumps(t.served.reference.job(t.served.target, t.folder)) + "\n" for t in trials))
    with log.open("w") as errors:
        engine = subprocess.Popen([python, "-P", PROGRAM, jobs], stdout=subprocess.PIPE, stderr=errors, text=True)
        with engine:
            for line in engine.stdout or ():
                yield json.loads(line)
    if engine.returncode:
        raise UserError(f"vLLM's process ended with status {engine.returncode}:\n{log.read_text()[-3000:]}")


def judged(trial: Trial, answer: dict[str, Any]) -> dict[str, Any]:
    """Returns the finding of a trial: a draft must agree with jeagle's decoding, and one with a fault must not."""
    reference = trial.served.reference
    wrong = differences(reference, answer)
    return {
        "engine": "vllm",
        "draft": trial.served.name,
        "layout": trial.layout,
        "fault": trial.fault,
        "as_it_should": bool(wrong) == bool(trial.fault),
        "found": answer.get("together", answer.get("failed")),
        "jeagle": dataclasses.asdict(reference.counted()),
        "prompts": len(reference.prompts),
        "least_gap": reference.least_gap,
        "differences": wrong,
    }
