"""From a batch to the draft's loss: live slots, the target's features, TTT steps, objective."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jeagle import align, drafts, objective, targets
from jeagle.config import RunConfig
from jeagle.interfaces import PLAIN_LOGITS, Batch, DraftSpec, Features, LogitShape, Tables
from jeagle.run import assemble
from jeagle.run.parameters import Trained
from jeagle.runtime import distributed
from jeagle.runtime.mesh import RULES, platform, row_parts


class Program(NamedTuple):
    """What is static about a step.

    Attributes:
      target, draft: graphdefs of the two models.
      taps: layer boundaries of the target that are fused.
      objective: the switches of the loss.
      ttt_steps: K.
      dtype: of the draft's matrix products.
      logits: what the target's family does to its logits, which teach.
      parts: that a batch's rows are worked through in, one after the other.
      average: decay of the moving average of parameters; 0 keeps none.
      mesh: over which rows, parameters and gradients are split; None for one device.
      remat: products of the TTT steps are made again in the backward pass: less memory for more FLOPs.
      trained: which of the draft's parameters are.
      top_k: of the target's distributions that it computes, so many of the likeliest tokens teach, as in the store that
        the other rows are read from; 0: all.
      attention: backend of the attention to step-0 keys; None takes the platform's.
    """

    target: Any
    draft: Any
    aux_layers: tuple[int, ...]
    objective: objective.ObjectiveSpec
    ttt_steps: int
    dtype: Any
    logits: LogitShape = PLAIN_LOGITS
    parts: int = 1
    average: float = 0.0
    mesh: Mesh | None = None
    remat: bool = False
    trained: Trained = Trained()
    top_k: int = 0
    attention: drafts.Backend | None = None


class Frozen(NamedTuple):
    """Arrays that a step reads and never changes."""

    target: Any
    tables: Tables


class Live(NamedTuple):
    """Where a batch needs work: which slots count at each step, the slots, and the positions that teach them."""

    counts_KBT: jax.Array
    slots: align.Selected
    teachers: align.Selected


def attention_of(mesh: Mesh | None) -> drafts.Backend:
    """The backend of the attention to step-0 keys on such a mesh: XLA cannot split a kernel over heads by itself."""
    return drafts.BY_PLATFORM[platform(mesh)] if mesh is None or mesh.size == row_parts(mesh) else "chunked"


def trusted_attention(mesh: Mesh, spec: DraftSpec, dtype: Any) -> drafts.Backend:
    """As `attention_of`; the chunked code, and a note, where the kernel does not give here what that gives."""
    backend = attention_of(mesh)
    if backend == "chunked":
        return backend
    heads = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
    wrong = drafts.kernel_fault(backend, dtype, **heads)
    if wrong:
        print(f"note: the {backend} kernel of the TTT attention is not used: {wrong}; slower, not wrong", flush=True)
    return "chunked" if distributed.anywhere(bool(wrong)) else backend


def program_of(
    config: RunConfig, spec: DraftSpec, draft: Any, mesh: Mesh, target: Any, logits: LogitShape, *, top_k: int = 0
) -> Program:
    """What is static about a run's step, which asks its device whether its attention kernel can be trusted.

    Args:
      spec, draft: of the draft, and its graphdef. target: graphdef; None where all features are read from a store.
      logits, top_k: as in `Program`.
    """
    dtype, trained = jnp.dtype(config.train.dtype), assemble.trained(config.draft)
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
        trained=trained,
        top_k=top_k,
        attention=trusted_attention(mesh, spec, dtype),
    )


def live_positions(program: Program, batch: Batch, width: int) -> Live:
    """The live slots and teacher positions of a batch, gathered to `width`, which must suffice."""
    spec = program.objective
    counts = align.counting_slots(batch, program.ttt_steps, spec.slots, cross_documents=spec.cross_documents)
    reads = align.read_positions(batch.segments_BT, program.ttt_steps, cross_documents=spec.cross_documents)
    taught = align.teacher_positions(counts, reads)
    return Live(counts, align.select(counts.any(axis=0), width), align.select(taught, width))


def target_features(program: Program, frozen: Frozen, batch: Batch, live: Live) -> Features:
    """The frozen target's features of a batch."""
    model = nnx.merge(program.target, frozen.target)
    wanted = jnp.zeros(batch.tokens_BT.shape, bool)
    rows = jnp.arange(wanted.shape[0])[:, None]
    wanted = wanted.at[rows, live.teachers.positions_BN].set(live.teachers.live_BN)
    found = targets.features(
        model, batch, program.aux_layers, wanted, live.teachers.positions_BN.shape[1], program.top_k
    )
    return jax.lax.stop_gradient(found)


def draft_loss(
    program: Program,
    draft: Any,
    batch: Batch,
    features: Features,
    tables: Tables,
    live: Live,
    divisor_K: jax.Array | None = None,
) -> tuple[jax.Array, objective.Metrics]:
    """The loss of a draft on features, and its figures.

    Where a mesh splits the batch's rows, each device runs the TTT steps and the loss of its own rows: the draft's
    parameters are gathered once a step, and their gradients summed over the devices once, not in every loop.
    """
    draft = drafts.with_adapters(draft)
    args = draft, batch, features, tables.embed_VW[batch.tokens_BT], tables, live, divisor_K
    mesh = program.mesh
    if mesh is None or row_parts(mesh) == 1:
        return _loss_of_rows(program, (), *args)
    axes = tuple(RULES["rows"])
    whole, rows = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        functools.partial(_loss_of_rows, program, axes),
        mesh=mesh,
        in_specs=(whole, rows, rows, rows, whole, Live(PartitionSpec(None, axes), rows, rows), whole),
        out_specs=whole,
        axis_names={*axes, *(axis for axis, size in mesh.shape.items() if size == 1)},
        check_vma=False,
    )(*args)


def _loss_of_rows(
    program: Program,
    over: tuple[str, ...],
    draft: Any,
    batch: Batch,
    features: Features,
    embedded_BTW: jax.Array,
    tables: Tables,
    live: Live,
    divisor_K: jax.Array | None,
) -> tuple[jax.Array, objective.Metrics]:
    spec, mesh, kind = program.objective, program.mesh, platform(program.mesh)
    predictions = drafts.unroll(
        program.draft,
        draft,
        batch,
        features.aux_BTAH,
        embedded_BTW,
        live.slots,
        live.counts_KBT,
        cross_documents=spec.cross_documents,
        fixed_window=spec.fixed_window,
        remat=program.remat,
        chunk_mlp=mesh is None or mesh.shape["tensor"] == 1,
        backend=program.attention or attention_of(mesh),
    )
    return objective.objective(
        spec,
        predictions,
        features,
        batch,
        tables,
        nnx.merge(program.draft, draft).lm_head[...],
        live.teachers,
        dtype=program.dtype,
        slots=live.slots,
        logits=program.logits,
        divisor_K=divisor_K,
        over=over,
        chunk_rows=objective.CPU_CHUNK if kind == "cpu" else objective.ACCELERATOR_CHUNK,
    )
