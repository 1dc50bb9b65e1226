"""`python -m jeagle.train --config FILE`: train an EAGLE-3 draft against its frozen target.

A Flax target, sharded on a mesh, produces fused hidden states that feed a jit-compiled scan over TTT steps in the Flax
draft. The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jeagle import assemble, data, dataset
from jeagle import config as configs
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.joints import Batch
from jeagle.runtime import distributed
from jeagle.runtime.checkpoints import Checkpoints
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import atomic_write, differences, finished_manifest
from jeagle.runtime.mesh import row_sharding
from jeagle.runtime.preemption import stop_requested
from jeagle.runtime.progress import Progress
from jeagle.runtime.trackers import Trackers, open_trackers
from jeagle.step import Frozen, Program, Report, train_step


def main(arguments: list[str]) -> None:
    config = configs.from_command_line(arguments, program="python -m jeagle.train", description=__doc__)
    prepare_host()
    # Before the processes join: preparing may take longer than they wait for one another.
    if distributed.may_lead():
        dataset.prepare(config)
    distributed.initialise()
    train(config)


def train(config: RunConfig) -> dict[str, Any]:
    """The whole run, from its folder's state on. Returns the last step's figures."""
    learnt, mesh = assemble.objective_spec(config.objective), assemble.mesh_of(config)
    claim_folder(config)
    prepared = dataset.prepare(config)  # found, or made on a host that does not share the leader's disk
    distributed.same_everywhere(finished_manifest(prepared.data)["made_from"]["source"], "the data's source")
    loaded = assemble.load_target(config, mesh)
    vocabulary = assemble.draft_to_target(config)
    tables = assemble.make_tables(loaded.target, vocabulary, mesh)
    spec = assemble.draft_spec(config, loaded.target.spec, len(vocabulary), loaded.end_token_ids)
    head = assemble.starting_head(config.draft, loaded.target.spec, tables)
    graphdef, draft = assemble.make_draft(spec, config.train.dtype, mesh, seed=config.train.seed, head=head)

    stream = open_stream(config)
    steps = config.train.steps or max(round(config.train.epochs * stream.steps_per_epoch), 1)
    optimiser = assemble.make_optimiser(
        config.train, assemble.learning_rate(config.train, steps), train_head=config.draft.train_head
    )
    state = assemble.train_state(draft, optimiser, mesh)
    describe_draft(config, spec, loaded.files.fingerprint)
    checkpoints = Checkpoints(config.folder / "checkpoints", keep=config.train.keep)
    start = checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, state)

    program = Program(
        loaded.target.graphdef,
        graphdef,
        spec.taps,
        learnt,
        config.draft.ttt_steps,
        jnp.dtype(config.train.dtype),
        loaded.target.spec.logits,
    )
    frozen = Frozen(loaded.target.state, tables)
    buckets = choose_buckets(stream, program, steps, config.train.slot_buckets, config.data.row_length)
    log = Log(config, start, steps)
    with log, stop_requested() as stopping:
        for step, widest, rows in stream.from_step(start, steps):
            batch = put_batch(rows, mesh)
            width = next(b for b in buckets if b >= widest)
            state, report = train_step(program, optimiser, state, frozen, batch, width)
            log.step(step, report, rows)
            if (step + 1) % config.train.save_every == 0 or step + 1 == steps or stopping():
                log.drain()
                checkpoints.save(step + 1, state)
            if stopping():
                break
        log.drain()
    checkpoints.close()
    if int(state.step) < steps:
        raise KeyboardInterrupt
    return log.last


def claim_folder(config: RunConfig) -> None:
    """Writes config.json, or checks that the run found there was begun with the same settings."""
    path = config.folder / "config.json"
    wanted = configs.to_json(config)
    if path.is_file() and (config.folder / "checkpoints").is_dir():
        fields = [f for f in differences(json.loads(path.read_text()), wanted) if f.split(".")[0] in _SHAPING]
        if fields:
            raise UserError(
                f"The run {config.folder} was begun with other settings ({', '.join(fields)}): give the same ones "
                "to go on with it, or another --name to begin anew."
            )
    if distributed.is_leader():
        atomic_write(path, json.dumps(wanted, indent=2) + "\n")


_SHAPING = ("target", "data", "draft", "objective", "train")


def describe_draft(config: RunConfig, spec: Any, target_fingerprint: str) -> None:
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


def open_stream(config: RunConfig) -> data.RowStream:
    """This process's share of the run's training rows."""
    return data.RowStream(
        config.folder / "data" / "train",
        config.train.batch_rows,
        config.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
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


def put_batch(rows: Batch, mesh: Any) -> Batch:
    """This process's rows -> the global batch on the mesh."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)


class Log:
    """Metrics to the trackers and the progress line, a step late, so that the device never waits for the host."""

    def __init__(self, config: RunConfig, start: int, steps: int):
        self.every, self.steps = config.train.log_every, steps
        leader = distributed.is_leader()
        self.trackers = open_trackers(config.trackers, config.folder, start) if leader else Trackers([])
        self.progress = Progress(steps, "steps", "train")
        self.progress.update(start)
        self.rate = assemble.learning_rate(config.train, steps)
        self.pending: list[tuple[int, Report, int]] = []
        self.last = last_logged(config.folder)  # what a run that was finished before has to tell
        self.tokens, self.started = 0, time.monotonic()

    def __enter__(self) -> Log:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        self.trackers.close()

    def step(self, step: int, report: Report, rows: Batch) -> None:
        self.pending.append((step, report, int((rows.segments_BT > 0).sum()) * jax.process_count()))
        if len(self.pending) > 1:
            self._take(*self.pending.pop(0))

    def drain(self) -> None:
        while self.pending:
            self._take(*self.pending.pop(0))

    def _take(self, step: int, report: Report, tokens: int) -> None:
        self.tokens += tokens
        figures = dict(summarise(report), learning_rate=float(self.rate(step)), tokens_per_s=self._speed())
        self.last = {"step": step + 1, **figures}
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            self.trackers.log(step + 1, figures)
        accuracy = " ".join(f"{figures[k]:.2f}" for k in _accuracies(figures))
        self.progress.update(
            step + 1,
            loss=figures["loss"],
            accuracy=accuracy,
            E=figures["expected_acceptance_length"],
            **{"tokens/s": figures["tokens_per_s"]},
        )

    def _speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.started, 1e-6)


def last_logged(folder: Path) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl; empty where there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def _accuracies(figures: dict[str, float]) -> Iterator[str]:
    return iter(sorted((k for k in figures if k.startswith("accuracy_")), key=lambda k: int(k[9:])))


def summarise(report: Report) -> dict[str, float]:
    """Means of a step's figures: loss, accuracy and acceptance per draft position, and what they let expect.

    expected_acceptance_length is E = 1 + sum over k of the product of the greedy accuracies up to k.
    """
    report = jax.device_get(report)
    f = report.figures
    accuracy = f.correct / np.maximum(f.counting, 1)
    accepted = f.accepted / np.maximum(f.trained, 1)
    figures = {"loss": float(report.loss), "gradient_norm": float(report.gradient_norm)}
    figures |= {f"loss_{k}": float(v) for k, v in enumerate(f.loss)}
    figures |= {f"accuracy_{k}": float(v) for k, v in enumerate(accuracy)}
    figures |= {f"acceptance_{k}": float(v) for k, v in enumerate(accepted)}
    figures["expected_acceptance_length"] = float(1 + np.cumprod(accuracy).sum())
    figures["taken"] = float(report.taken)
    return figures


if __name__ == "__main__":
    run(main)
