"""`python -m jeagle.train --config FILE`: train an EAGLE-3 draft against its frozen target.

A Flax target, sharded on a mesh, produces fused hidden states that feed a jit-compiled scan over TTT steps in the Flax
draft. The same command again goes on from the last checkpoint.
"""

from typing import Any

from jeagle import flags
from jeagle.config import RunConfig
from jeagle.run import assemble
from jeagle.run.claim import claimed
from jeagle.run.draft_init import held_out_scores
from jeagle.runtime import distributed
from jeagle.runtime.checkpoints import Checkpoints
from jeagle.runtime.cli import run as run_command
from jeagle.runtime.host import prepare_host
from jeagle.runtime.preemption import stop_requested
from jeagle.runtime.trace import StepTrace
from jeagle.training.held_out import HeldOut
from jeagle.training.metrics import MetricsLog
from jeagle.training.setup import Inputs, open_inputs, set_up
from jeagle.training.step import train_step

READS = (
    "name",
    "runs",
    "features",
    "features_rest",
    "trackers",
    "profile",
    "target",
    "data",
    "draft",
    "objective",
    "train",
    "mesh",
    "store",
)
"""The settings that this command reads."""


def main(arguments: list[str]) -> None:
    config = flags.from_command_line(arguments, program="python -m jeagle.train", description=__doc__, reads=READS)
    prepare_host()
    with claimed(config):
        assemble.check_files(config.folder)
        # Before the processes join, because preparing may take longer than they wait for one another.
        inputs = open_inputs(config) if distributed.may_lead() else None
        distributed.initialise()
        with claimed(config):  # by now it is known which process leads
            train(config, inputs)


def train(config: RunConfig, inputs: Inputs | None = None) -> dict[str, Any]:
    """Trains the draft of a run against its target, from the last checkpoint on. Returns the last step's metrics."""
    run, state = set_up(config, inputs)  # target, draft, rows and optimiser

    scores = held_out_scores(config.folder)
    checkpoints = Checkpoints(config.folder / "checkpoints", keep=config.train.keep, scores=scores)
    start, state = checkpoints.newest(state)

    metrics, evaluation = MetricsLog.of(run, state.draft, start), HeldOut(run, start, scores)
    trace = StepTrace(config.folder / "profile", config.profile)
    with checkpoints, metrics, evaluation, stop_requested() as stopping:
        if start and run.due(start):
            metrics.say(evaluation.again(start, state))
        for batch in run.batches(start):
            arguments = run.program, run.optimiser, state, run.frozen, batch.rows, batch.width, batch.stored
            flops = metrics.count_flops(train_step, arguments)
            with trace:
                state, report = trace.wait(train_step(*arguments))
            metrics.step(batch, report, state.draft, flops)
            stop, done = stopping(batch.step), batch.step + 1
            if run.due(done) or stop:
                metrics.drain()
                checkpoints.save(done, state)
            if run.due(done):
                metrics.say(evaluation(done, state))
            if stop:
                break
        metrics.drain()
    if int(state.step) < run.steps:
        raise KeyboardInterrupt
    return metrics.last


if __name__ == "__main__":
    run_command(main)
