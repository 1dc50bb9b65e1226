"""`python -m benchmarks.step --work W1 --json`: what one training step of a draft costs, the target's features given.

The frozen target's taps and last states are arrays; its logits over the whole vocabulary, the TTT steps, the gradients,
the clipping, AdamW and the new parameters are the step's, as in `jeagle.training.step.train_step`. Works:
`benchmarks.works`; W4 stands for all its lengths.

The last line printed is a JSON object: wall_s_per_step and cpu_s_per_step (the least of the steps after the first),
compile_s, temp_bytes (what XLA allots beside arguments and results), peak_rss_bytes, flops_needed (see
`benchmarks.needed`), flops_counted (from the jaxpr), flops_share, needed by counted, and needed_flops_per_s, which is
the MFU by a chip's peak; of W3, all of it with remat beside it. On CPUs W3, and W4 beyond 4096, are compiled and not
run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.command import begin, options
from benchmarks.needed import needed_flops
from benchmarks.timing import compiled, least, peak_rss_bytes
from benchmarks.works import W4_LENGTHS, WORKS, Arrays, Work, array_shapes, make, make_batch
from jeagle import align, objective
from jeagle.drafts import Eagle3
from jeagle.interfaces import Batch, Features, Tables
from jeagle.runtime.flops import flops_of
from jeagle.runtime.xla_workarounds import clip_by_global_norm, flat_matmul
from jeagle.targets.model.features import distributions
from jeagle.training.step import Program, StepReport, TrainState, draft_loss, live_slots, update

# The peers' slots and scale (targets argmax outside the draft vocabulary dropped); and what jeagle trains with.
OBJECTIVES = {
    "peers": dataclasses.replace(
        objective.DIALECTS["speculators"],
        loss="soft_ce",
        decay=0.8,
        normaliser="all_slots",
        mask_out_of_vocab=True,
        cross_documents=False,
        fixed_window=False,
        renormalised=False,
    ),
    "ours": objective.DIALECTS["jeagle"],
}
LONGEST_RUN = 4096  # positions; longer works are compiled only, on CPUs


class Given(NamedTuple):
    """What the step reads and never changes."""

    batch: Batch
    aux_BTAH: jax.Array
    last_BTH: jax.Array
    head_VH: jax.Array
    tables: Tables


class FullHead(NamedTuple):
    """The target's lm_head, for the teacher's logits."""

    head_VH: jax.Array
    dtype: Any

    def logits(self, last: jax.Array) -> jax.Array:
        return flat_matmul(last.astype(self.dtype), self.head_VH.astype(self.dtype), transposed=True)


@functools.partial(jax.jit, static_argnames=("program", "optimiser", "width"), donate_argnames=("state",))
def step(
    program: Program, optimiser: optax.GradientTransformation, state: TrainState, given: Given, width: int
) -> tuple[TrainState, StepReport]:
    """One step; `width` live slots a row suffice."""
    batch = given.batch
    live = live_slots(program, batch, width)
    places = live.teachers.positions_BN
    greedy, lse, _ = distributions(FullHead(given.head_VH, program.dtype), align.take_rows(given.last_BTH, places))
    rows, empty = jnp.arange(places.shape[0])[:, None], jnp.zeros(batch.tokens_BT.shape, jnp.float32)
    features = Features(
        given.aux_BTAH,
        given.last_BTH,
        empty.astype(jnp.int32).at[rows, places].set(greedy),
        empty.at[rows, places].set(lse),
    )

    def loss_of(draft):
        return draft_loss(program, draft, batch, features, given.tables, live)

    return update(program, optimiser, state, *jax.value_and_grad(loss_of, has_aux=True)(state.draft))


def optimiser() -> optax.GradientTransformation:
    return optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.0))


def program_of(work: Work, dtype: str, *, remat: bool = False) -> tuple[Program, Any]:
    """(what is static about the step, the draft's state as shapes)."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Eagle3(work.spec(), jnp.dtype(dtype), nnx.Rngs(0))))
    spec = OBJECTIVES[work.objective]
    return Program(None, graphdef, work.spec().aux_layers, spec, work.steps, jnp.dtype(dtype), remat=remat), abstract


def draft_state(abstract: Any, arrays: Arrays) -> Any:
    """The work's parameters in the draft's own layout."""

    def leaf(path: tuple[Any, ...]) -> jax.Array:
        name = ".".join(map(str, path)).replace("layers.0.", "midlayer.") + ".weight"
        array = arrays.params[name]
        return jnp.asarray(array.T if array.ndim == 2 and path[-1] != "lm_head" else array)

    return nnx.from_flat_state([(path, v.replace(leaf(path))) for path, v in nnx.to_flat_state(abstract)])


def live_of(work: Work, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(slots that count at each step [K, B, T], positions that teach some of them [B, T])."""
    counts = align.counting_slots(batch, work.steps, OBJECTIVES[work.objective].slots, xp=np)
    return counts, align.teacher_positions(counts, align.read_positions(batch.segments_BT, work.steps, xp=np), xp=np)


def slot_width(work: Work, batch: Batch) -> int:
    """Live slots of the fullest row, rounded up as training does."""
    counts, taught = live_of(work, batch)
    most = int(max(counts.any(axis=0).sum(axis=1).max(), taught.sum(axis=1).max()))
    return min(-(-most // 16) * 16, work.length)


def start(arrays: Arrays, abstract: Any, dtype: str) -> tuple[TrainState, Given]:
    # The target's own weights are stored in the type of its products.
    head, embed = jnp.asarray(arrays.head_VH, dtype), jnp.asarray(arrays.embed_VW, dtype)
    chosen = jnp.asarray(arrays.draft_to_target_D)
    tables = Tables(embed, head[chosen], chosen)
    batch = jax.tree.map(jnp.asarray, arrays.batch)
    given = Given(batch, jnp.asarray(arrays.aux_BTAH), jnp.asarray(arrays.last_BTH), head, tables)
    draft = draft_state(abstract, arrays)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(draft, optimiser().init(draft), zero, jnp.copy(zero)), given


class Bench(NamedTuple):
    """A work as a program, and what runs it."""

    work: Work
    program: Program
    abstract: Any
    batch: Batch
    width: int
    optimiser: optax.GradientTransformation

    def lower(self, state: Any, given: Any) -> Any:
        return step.lower(self.program, self.optimiser, state, given, self.width)

    def shapes(self) -> tuple[Any, Any]:
        """State and given of this work as shapes: nothing is allocated."""

        def started(fields: dict[str, Any]) -> tuple[TrainState, Given]:
            return start(Arrays(checksum="", **fields), self.abstract, self.program.dtype)

        return jax.eval_shape(started, array_shapes(self.work))

    def flops(self) -> dict[str, float]:
        counts, taught = live_of(self.work, self.batch)
        run = functools.partial(step.__wrapped__, self.program, self.optimiser, width=self.width)
        counted = flops_of(lambda state, given: run(state, given), *self.shapes())
        needed = needed_flops(self.work, counts, taught)
        return {"flops_needed": needed, "flops_counted": counted, "flops_share": round(needed / counted, 4)}


def bench_of(work: Work, batch: Batch, dtype: str, *, remat: bool) -> Bench:
    program, abstract = program_of(work, dtype, remat=remat)
    return Bench(work, program, abstract, batch, slot_width(work, batch), optimiser())


def measure(name: str, work: Work, dtype: str, *, remat: bool, run: bool, budget_s: float) -> dict[str, Any]:
    """Compiles the step of a work, runs it where asked to, and tells what it costs."""
    arrays = make(work) if run else None
    bench = bench_of(work, arrays.batch if arrays else make_batch(work), dtype, remat=remat)
    result = {"work": name, "dtype": dtype, "remat": remat, "slots": bench.width} | bench.flops()
    state, given = start(arrays, bench.abstract, dtype) if arrays else bench.shapes()
    program, cost = compiled(lambda: bench.lower(state, given))
    result |= cost
    if arrays:
        result |= {"checksum": arrays.checksum} | timed(program, state, given, budget_s)
        result["needed_flops_per_s"] = result["flops_needed"] / result["wall_s_per_step"]
    result["peak_rss_bytes"] = peak_rss_bytes()
    return result


def timed(program: Any, state: Any, given: Any, budget_s: float) -> dict[str, Any]:
    def run() -> StepReport:
        nonlocal state
        state, report = program(state, given)
        jax.block_until_ready(state)
        return jax.device_get(report)

    first, times = least(run, budget_s, "step")
    return {"first_loss": float(first.loss), "first_gradient_norm": float(first.gradient_norm)} | times


def runs_here(name: str) -> bool:
    """Whether this machine can run a work in bearable time."""
    work = WORKS[name]
    return jax.default_backend() != "cpu" or (work.rows * work.length <= LONGEST_RUN and name != "W3")


def spare_memory() -> None:
    """Has XLA's CPU backend order operations for memory instead of for many threads; before JAX's first work."""
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def main() -> None:
    parser = options(__doc__, ["W4", *WORKS], seconds=20.0, of="steps")
    parser.add_argument("--remat", action="store_true", help="keep little for the backward pass, in CPU's memory order")
    args = begin(parser)
    if args.remat or args.work == "W3":
        spare_memory()
    found = []
    for name in [f"W4_{length}" for length in W4_LENGTHS] if args.work == "W4" else [args.work]:
        each = functools.partial(measure, name, WORKS[name], args.dtype or WORKS[name].dtype, budget_s=args.seconds)
        run = not args.compile_only and runs_here(name)
        found.append(each(remat=args.remat, run=run))
        if name == "W3" and not args.remat:
            found[-1]["with_remat"] = each(remat=True, run=run)
        print(json.dumps(found[-1]), flush=True)
    if args.work == "W4":
        print(json.dumps({"work": "W4", "lengths": found}))


if __name__ == "__main__":
    main()
