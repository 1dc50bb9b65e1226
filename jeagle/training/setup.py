"""Setting a run up: its target, draft, rows and optimiser on the mesh, and the state before the first step."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jeagle import data, drafts, features, targets
from jeagle.config import RunConfig, from_json, to_json
from jeagle.errors import UserError
from jeagle.interfaces import Batch, DraftSpec, LogitShape, Tables
from jeagle.run import assemble
from jeagle.run.claim import CONFIG, DRAFT
from jeagle.run.dataset import Prepared
from jeagle.run.draft_init import check_engines, draft_spec, keep_embedding
from jeagle.runtime import distributed
from jeagle.runtime.ahead import read_ahead
from jeagle.runtime.manifest import atomic_write, differences, finished_manifest
from jeagle.runtime.mesh import row_parts, row_sharding
from jeagle.training import teacher
from jeagle.training.optimiser import learning_rate, make_optimiser
from jeagle.training.step import Frozen, Program, TrainState, first_state

_AHEAD = 4  # batches read before they are needed


class StepBatch(NamedTuple):
    """What one step reads.

    Attributes:
      step: its number, from 0.
      rows: the global batch, on the mesh.
      stored: its features as a store holds them, on the mesh; None where the target computes them.
      width: N, to which live slots are gathered.
      tokens: how many tokens of the global batch are not padding.
      read_share: 1 where its features were read and 0 where the target computes them; None for a run whose batches are
        all of one kind.
    """

    step: int
    rows: Batch
    stored: Any
    width: int
    tokens: int
    read_share: float | None = None


class Run(NamedTuple):
    """All that the steps of a run need besides the state that they change.

    Attributes:
      steps: how many steps the whole run has.
      widths: to which live slots are gathered, rising; each is one compilation.
    """

    config: RunConfig
    mesh: Mesh
    program: Program
    optimiser: optax.GradientTransformation
    frozen: Frozen
    stream: data.RowStream
    stores: features.StoreSet | None
    steps: int
    widths: list[int]

    def batches(self, start: int) -> Iterator[StepBatch]:
        """What the steps from `start` on read, in order. It is read ahead on threads.

        The features of a batch are read from a store whole, or computed whole, on all processes alike.
        """

        def read(step: int) -> tuple[int, Batch, features.StoredFeatures | None]:
            rows, stored = self.stream.batch(step), None
            if self.stores and self.stores.has_all("train", self.stream.row_numbers(step)):
                stored = self.stores.stored("train", self.stream.own_row_numbers(step), rows)
            return step, rows, stored

        for step, rows, stored in read_ahead(range(start, self.steps), read, threads=2, depth=_AHEAD):
            width = next(width for width in self.widths if width >= self.stream.widest(step))
            tokens = int((rows.segments_BT > 0).sum()) * jax.process_count()
            share = float(stored is not None) if self.stores and self.stores.partial else None
            yield StepBatch(step, put_rows(rows, self.mesh), put_rows(stored, self.mesh), width, tokens, share)

    def check_target(self, rows: Batch) -> None:
        """UserError where the target, if the run has one, gives numbers that are not finite for rows on the mesh."""
        if self.program.target is not None:
            targets.check_finite(self.program.target, self.frozen.target, rows)

    def due(self, step: int) -> bool:
        """Whether the state after so many steps is saved and evaluated."""
        return step % self.config.train.save_every == 0 or step == self.steps


class Draft(NamedTuple):
    """The run's draft before its first step, on the mesh: `state` holds what is trained, `tables` what is frozen.

    `description` is the content of draft.json.
    """

    spec: DraftSpec
    graphdef: Any
    state: Any
    tables: Tables
    description: dict[str, Any]


Inputs = tuple[features.StoreSet | None, Prepared]
"""The stores that a run's rows and features come from, if any do, and its rows and vocabulary tables."""


def open_inputs(config: RunConfig) -> Inputs:
    """Checks the settings, opens the stores and prepares the rows. UserError where they do not fit each other."""
    check_settings(config)
    check_draft(config)
    stores = teacher.open_stores(config)
    return stores, teacher.prepare_inputs(config, stores)


def set_up(config: RunConfig, inputs: Inputs | None = None) -> tuple[Run, TrainState]:
    """Target, draft, rows and optimiser, on the mesh, and the state before the first step.

    Args:
      inputs: of `open_inputs`, where the caller has opened them already.

    Raises:
      UserError: where the parts do not fit each other. Nothing has been written then.
    """
    mesh = assemble.mesh_of(config)
    check_parts(config, mesh)
    stores, prepared = inputs or open_inputs(config)
    distributed.same_everywhere(finished_manifest(prepared.data)["made_from"]["source"], "the data's source")

    stores, target = teacher.open_teacher(config, stores, prepared, mesh)
    draft = open_draft(config, target, mesh)
    stream = data.RowStream(
        config.folder / "data" / "train",
        config.train.batch_rows,
        config.train.seed,
        vocab=target.spec.vocab,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps = config.train.steps or max(round(config.train.epochs * stream.steps_per_epoch), 1)
    trained = assemble.trained(config.draft)
    optimiser = make_optimiser(config.train, learning_rate(config.train, steps), trained=trained)

    top_k = stores.members[0].format.top_k if stores else 0
    program = make_program(config, draft.spec, draft.graphdef, mesh, target.graphdef, target.spec.logits, top_k=top_k)
    widths = slot_widths(stream, program, steps, config.train.slot_buckets, config.data.row_length)
    write_folder(config, draft)
    run = Run(config, mesh, program, optimiser, Frozen(target.state, draft.tables), stream, stores, steps, widths)
    return run, first_state(draft.state, optimiser, mesh, average=config.train.ema)


def open_draft(config: RunConfig, target: teacher.Teacher, mesh: Mesh) -> Draft:
    """The run's draft before its first step. UserError where target or engines refuse it, or its run another one."""
    vocabulary, older = data.load_tables(config.folder / "tables"), assemble.open_start(config)
    spec = draft_spec(config, target.spec, len(vocabulary), target.end_token_ids, older)
    check_engines(config.draft, spec, target.spec.layers)
    description = describe_draft(config, spec, target.fingerprint)
    tables = assemble.draft_tables(target.tables(vocabulary), mesh, spec=spec, folder=config.folder, start=older)
    graphdef, state = assemble.draft_state(config, spec, target.spec, tables, mesh, older)
    return Draft(spec, graphdef, state, tables, description)


def make_program(
    config: RunConfig, spec: DraftSpec, draft: Any, mesh: Mesh, target: Any, logits: LogitShape, *, top_k: int = 0
) -> Program:
    """What is static about a run's step. Its device is asked whether its attention kernel can be trusted.

    Args:
      spec, draft: of the draft, and its graphdef. target: the target's graphdef, or None.
      logits, top_k: as in `Program`.
    """
    dtype = jnp.dtype(config.train.dtype)
    return Program(
        target,
        draft,
        spec.aux_layers,
        assemble.objective_spec(config.objective),
        config.draft.ttt_steps,
        dtype,
        logits,
        config.train.accumulate,
        config.train.ema,
        mesh,
        remat=config.train.remat,
        trained=assemble.trained(config.draft),
        top_k=top_k,
        attention=drafts.trusted_backend(mesh, spec, dtype),
    )


def slot_widths(stream: data.RowStream, program: Program, steps: int, count: int, length: int) -> list[int]:
    """At most `count` widths for live slots: quantiles of what the run's batches need, the last one enough for all."""
    spec = program.objective
    stream.count_live(program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    needed = np.array([stream.widest(step) for step in range(min(steps, stream.steps_per_epoch * 4))])
    quantiles = np.quantile(needed, np.arange(1, count + 1) / count)
    quantiles[-1] = max(needed.max(), stream.most_live())
    round_to = 16 if length >= 128 else 1
    return sorted({min(-(-int(q) // round_to) * round_to, length) for q in quantiles})


def put_rows(rows: Any, mesh: Mesh) -> Any:
    """This process's rows (arrays [B, ...]) -> those of the global batch on the mesh."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)


def check_settings(config: RunConfig) -> None:
    """UserError where the run in the folder was begun with other settings."""
    fixed = ("target", "data", "draft", "objective", "train")
    changes = _changes_since(config, "config.json", lambda begun: to_json(from_json(begun)), to_json(config))
    if fields := [field for field in changes if field.split(".")[0] in fixed]:
        raise UserError(
            f"The run {config.folder} was begun with other settings ({', '.join(fields)}): give the same ones "
            "to go on with it, or another --name to begin anew."
        )


def _changes_since(config: RunConfig, name: str, read: Callable[[dict], dict], now: dict) -> list[str]:
    """Which fields of a file of the run's folder are others `now`; none for a run that has no checkpoints yet."""
    path = config.folder / name
    begun = path.is_file() and (config.folder / "checkpoints").is_dir()
    return differences(read(json.loads(path.read_text())), now) if begun else []


def check_draft(config: RunConfig) -> None:
    """UserError for a draft that the target or an engine refuses, before anything is made of the target's data.

    Where features are read from stores the target need not be at hand, and `open_draft` alone checks it.
    """
    if config.features not in ("online", "auto"):
        return
    files = targets.resolve(config.target.ref)
    family = targets.own_family(config.target.family) if config.target.family else None
    target, size = targets.read_spec(targets.open_weights(files).config, family), config.draft.vocab
    vocabulary = size if 0 < size < target.vocab else target.vocab
    check_engines(config.draft, draft_spec(config, target, vocabulary, (), assemble.open_start(config)), target.layers)


def check_parts(config: RunConfig, mesh: Mesh) -> None:
    """UserError where --train.accumulate would change the loss, or its parts do not divide over the devices."""
    parts, rows = config.train.accumulate, config.train.batch_rows
    whole_batch = assemble.objective_spec(config.objective).needs_whole_batch
    if parts > 1 and whole_batch:
        raise UserError(f"--train.accumulate {parts} would change the loss: {whole_batch}. Leave it at 1.")
    if rows % (parts * row_parts(mesh)):
        raise UserError(
            f"--train.batch-rows {rows} must be a multiple of {parts * row_parts(mesh)}: {parts} parts of "
            f"--train.accumulate, each over {row_parts(mesh)} devices."
        )


def describe_draft(config: RunConfig, spec: DraftSpec, target_fingerprint: str) -> dict[str, Any]:
    """The content of draft.json: the draft's specification, and what it is trained from.

    UserError where the run was begun with another target, other data or another vocabulary.
    """
    rows, tables = (finished_manifest(config.folder / name) for name in ("data", "tables"))
    made_from = {"target": target_fingerprint, "data": rows["made_from"], "tables": tables}
    if fields := _changes_since(config, "draft.json", lambda begun: begun["made_from"], made_from):
        raise UserError(
            f"The run {config.folder} was begun from other inputs ({', '.join(fields)} differ): give another "
            "--name, or remove its checkpoints to train anew."
        )
    return {"draft": spec.to_json(), "made_from": made_from}


def write_folder(config: RunConfig, draft: Draft) -> None:
    """Writes config.json, draft.json and, where the draft has one of its own, its embedding."""
    if distributed.is_leader():
        for name, tree, kind in (
            ("config.json", assemble.sealed(to_json(config)), CONFIG),
            ("draft.json", draft.description, DRAFT),
        ):
            atomic_write(config.folder / name, json.dumps(tree, indent=2) + "\n", kind)
    keep_embedding(config.folder, draft.spec, draft.tables)
