"""`python -m jeagle.train --config FILE`: train an EAGLE-3 draft against its frozen target.

A Flax target, sharded on a mesh, produces fused hidden states that feed a jit-compiled scan over TTT steps in the Flax
draft. The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jeagle import data, features
from jeagle import flags as configs
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec
from jeagle.objective import ObjectiveSpec
from jeagle.run import assemble
from jeagle.run.draft_init import check_engines, draft_spec, held_out_scores, keep_embedding
from jeagle.runtime import distributed
from jeagle.runtime.changes import checksums, unchanged
from jeagle.runtime.checkpoints import Checkpoints
from jeagle.runtime.cli import run
from jeagle.runtime.flops import count_flops
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write, differences, finished_manifest
from jeagle.runtime.mesh import row_parts, row_sharding
from jeagle.runtime.preemption import stop_requested
from jeagle.runtime.trace import StepTrace
from jeagle.training import teacher as teaching
from jeagle.training.forward import Frozen, Program, program_of
from jeagle.training.held_out import HeldOut
from jeagle.training.metrics import Log
from jeagle.training.optimiser import learning_rate, make_optimiser
from jeagle.training.step import train_step


def main(arguments: list[str]) -> None:
    config = configs.from_command_line(arguments, program="python -m jeagle.train", description=__doc__)
    prepare_host()
    # Before the processes join: preparing may take longer than they wait for one another.
    if distributed.may_lead():
        teaching.prepare(config, teaching.open_stores(config))
    distributed.initialise()
    train(config)


def train(config: RunConfig) -> dict[str, Any]:
    """The whole run, from its folder's state on. Returns the last step's figures."""
    run, state = set_up(config)
    scores = held_out_scores(config.folder)
    checkpoints = Checkpoints(config.folder / "checkpoints", keep=config.train.keep, scores=scores)
    start = checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, state)
    buckets = choose_buckets(run.stream, run.program, run.steps, config.train.slot_buckets, config.data.row_length)
    log, watch = Log(config, start, run.steps, run.stream.row_numbers), Watch(config, state.draft, start)
    trace, flops = StepTrace(config.folder / "profile", config.profile), {}
    held_out = HeldOut(config, run.program, run.frozen, run.stores, start, scores)
    with log, held_out, stop_requested() as stopping:
        if start and due(config, run, start):
            log.say(held_out.again(start, state))
        for step, widest, rows, kept in teaching.with_features(run.stream, start, run.steps, run.stores):
            batch, stored = put_rows(rows, run.mesh), put_rows(kept, run.mesh)
            width = next(b for b in buckets if b >= widest)
            given = run.program, run.optimiser, state, run.frozen, batch, width, stored
            share = teaching.share_read(run.stores, rows, kept)
            if log.peak and (width, share) not in flops:
                flops[width, share] = count_flops(train_step.trace(*given).jaxpr)
            with trace:
                state, report = train_step(*given)
                trace.wait(report)
            log.step(step, report, rows, flops.get((width, share), 0.0), share)
            log.say(watch.after(step, state.draft))
            stop = stopping(step)
            if due(config, run, step + 1) or stop:
                log.drain()
                checkpoints.save(step + 1, state)
            if due(config, run, step + 1):
                log.say(held_out(step + 1, state))
            if stop:
                break
        log.drain()
    checkpoints.close()
    if int(state.step) < run.steps:
        raise KeyboardInterrupt
    return log.last


class Run(NamedTuple):
    """All that the steps of a run need beside the state that they change."""

    program: Program
    optimiser: optax.GradientTransformation
    frozen: Frozen
    stream: data.RowStream
    steps: int
    mesh: Any
    stores: features.Mixture | None


def due(config: RunConfig, run: Run, step: int) -> bool:
    """Whether the state after so many steps is saved and evaluated."""
    return step % config.train.save_every == 0 or step == run.steps


def set_up(config: RunConfig) -> tuple[Run, assemble.TrainState]:
    """Target, draft, rows and optimiser, on the mesh, and the state before the first step.

    UserError where they do not go together.
    """
    learnt, mesh = assemble.objective_spec(config.objective), assemble.mesh_of(config)
    check_parts(config, learnt, mesh)
    claim_folder(config)
    stores = teaching.filled_stores(config, mesh)
    prepared = teaching.prepare(config, stores)  # found, or made on a host that does not share the leader's disk
    distributed.same_everywhere(finished_manifest(prepared.data)["made_from"]["source"], "the data's source")
    teacher = teaching.teacher(config, stores, mesh)
    vocabulary, older = assemble.draft_to_target(config), assemble.open_start(config)
    spec = draft_spec(config, teacher.spec, len(vocabulary), teacher.end_token_ids, older)
    check_engines(config.draft, spec, teacher.spec.layers)
    describe_draft(config, spec, teacher.fingerprint)
    tables = assemble.draft_tables(teacher.tables(vocabulary), mesh, spec=spec, folder=config.folder, start=older)
    keep_embedding(config.folder, spec, tables)
    graphdef, draft = assemble.draft_state(config, spec, teacher.spec, tables, mesh, older)

    stream = open_stream(config, stores)
    steps = config.train.steps or max(round(config.train.epochs * stream.steps_per_epoch), 1)
    rate = learning_rate(config.train, steps)
    optimiser = make_optimiser(config.train, rate, trained=assemble.trained(config.draft))
    state = assemble.train_state(draft, optimiser, mesh, average=config.train.ema)
    top_k = stores.stores[0].form.top_k if stores else 0
    program = program_of(config, spec, graphdef, mesh, teacher.graphdef, teacher.spec.logits, top_k=top_k)
    return Run(program, optimiser, Frozen(teacher.state, tables), stream, steps, mesh, stores), state


def claim_folder(config: RunConfig) -> None:
    """Writes config.json, or checks that the run found there was begun with the same settings."""
    path = config.folder / "config.json"
    wanted = configs.to_json(config)
    if path.is_file() and (config.folder / "checkpoints").is_dir():
        begun = configs.to_json(configs.from_json(json.loads(path.read_text())))
        fields = [f for f in differences(begun, wanted) if f.split(".")[0] in _SHAPING]
        if fields:
            raise UserError(
                f"The run {config.folder} was begun with other settings ({', '.join(fields)}): give the same ones "
                "to go on with it, or another --name to begin anew."
            )
    if distributed.is_leader():
        atomic_write(path, json.dumps(wanted, indent=2) + "\n")


_SHAPING = ("target", "data", "draft", "objective", "train")


def check_parts(config: RunConfig, learnt: ObjectiveSpec, mesh: Any) -> None:
    """UserError where --train.accumulate would change the loss, or its parts do not divide over the devices."""
    parts, rows = config.train.accumulate, config.train.batch_rows
    if parts > 1 and learnt.needs_whole_batch:
        raise UserError(f"--train.accumulate {parts} would change the loss: {learnt.needs_whole_batch}. Leave it at 1.")
    if rows % (parts * row_parts(mesh)):
        raise UserError(
            f"--train.batch-rows {rows} must be a multiple of {parts * row_parts(mesh)}: {parts} parts of "
            f"--train.accumulate, each over {row_parts(mesh)} devices."
        )


class Watch:
    """Notices trained parameters that the first steps of a call have not moved."""

    STEPS = 100

    def __init__(self, config: RunConfig, draft: Any, start: int):
        self.at, self.moved = start + self.STEPS - 1, assemble.trained(config.draft)
        self.before = checksums(draft) if config.train.learning_rate else {}

    def after(self, step: int, draft: Any) -> str:
        """A warning, once, that names them; empty where there is nothing to say."""
        if step != self.at:
            return ""
        still = [path for path in unchanged(self.before, checksums(draft)) if self.moved(assemble.path_names(path))]
        return f"warning: not changed in {self.STEPS} steps: {', '.join(still)}" if still else ""


def describe_draft(config: RunConfig, spec: DraftSpec, target_fingerprint: str) -> None:
    """Writes draft.json: what the checkpoints' parameters are of, and what they are trained from.

    UserError when the run was begun with another target, other data or another vocabulary.
    """
    path = config.folder / "draft.json"
    parts = {name: finished_manifest(config.folder / name) for name in ("data", "tables")}
    made_from = {"target": target_fingerprint, "data": parts["data"]["made_from"], "tables": parts["tables"]}
    if path.is_file() and (config.folder / "checkpoints").is_dir():
        fields = differences(json.loads(path.read_text())["made_from"], made_from)
        if fields:
            raise UserError(
                f"The run {config.folder} was begun from other inputs ({', '.join(fields)} differ): give another "
                "--name, or remove its checkpoints to train anew."
            )
    if distributed.is_leader():
        tree = {"draft": spec.to_json(), "made_from": made_from}
        atomic_write(path, json.dumps(tree, indent=2) + "\n")


def open_stream(config: RunConfig, stores: features.Mixture | None = None) -> data.RowStream:
    """This process's share of the run's training rows."""
    return data.RowStream(
        config.folder / "data" / "train",
        config.train.batch_rows,
        config.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        shares=teaching.shares(stores),
    )


def choose_buckets(stream: data.RowStream, program: Program, steps: int, count: int, length: int) -> list[int]:
    """At most `count` widths for live slots: quantiles of what the run's batches need, the last one enough for all."""
    spec = program.objective
    stream.count_live(program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    needed = np.array([stream.widest(step) for step in range(min(steps, stream.steps_per_epoch * 4))])
    quantiles = np.quantile(needed, np.arange(1, count + 1) / count)
    quantiles[-1] = max(needed.max(), stream.most_live())
    round_to = 16 if length >= 128 else 1
    return sorted({min(-(-int(q) // round_to) * round_to, length) for q in quantiles})


def put_rows(rows: Any, mesh: Any) -> Any:
    """This process's rows (arrays [B, ...]) -> those of the global batch on the mesh."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)


if __name__ == "__main__":
    run(main)
