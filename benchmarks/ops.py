"""`python -m benchmarks.ops --work W1 --json`: what the two ops of a draft's step cost by themselves.

- attention, of one TTT step with all own keys of the steps before, forward and backward: by each backend that runs on
  this machine (`--backend` names another), and `reference`, which keeps all scores;
- objective: the losses of all steps from what lm_head reads, and their gradients.

Shapes, slots and types are the work's. Numbers are random: `tests/drafts/test_ttt_attention.py` and `tests/objective`
check them. One JSON object an op, and a last one of all, with wall_s_per_run and cpu_s_per_run (the least of the runs
after the first), compile_s, temp_bytes (what XLA allots beside arguments and results) and flops_counted (from the
jaxpr; of a kernel as if it skipped no key). On CPUs W3 is compiled and not run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.command import begin, options
from benchmarks.step import Bench, bench_of, runs_here
from benchmarks.timing import compiled, least, peak_rss_bytes
from benchmarks.works import WORKS, make_batch
from jeagle import objective
from jeagle.drafts import ttt_attention
from jeagle.interfaces import Features, Predictions, Tables
from jeagle.runtime.flops import flops_of
from jeagle.training.step import live_slots


class Op(NamedTuple):
    """A scalar function of arrays, the first `trained` of which it is differentiated by.

    Attributes:
      make: a key -> the arrays.
    """

    name: str
    function: Callable[..., jax.Array]
    trained: int
    make: Callable[[jax.Array], tuple[Any, ...]]

    def measure(self, *, run: bool, budget_s: float) -> dict[str, Any]:
        both = jax.jit(jax.value_and_grad(self.function, range(self.trained)))
        key = jax.random.key(0)
        args = jax.jit(self.make)(key) if run else jax.eval_shape(self.make, key)
        result: dict[str, Any] = {"op": self.name, "flops_counted": flops_of(both, *args)}
        program, cost = compiled(lambda: both.lower(*args))
        result |= cost
        if run:
            result |= least(lambda: jax.block_until_ready(program(*args)), budget_s, "run")[1]
        return result


def attention(bench: Bench, backend: str) -> Op:
    """At the live slots, of one document a row."""
    work, slots = bench.work, bench.width
    dtype = bench.program.dtype
    rows, own = (work.rows, work.kv_heads), work.steps - 1
    live = live_slots(bench.program, jax.tree.map(jnp.asarray, bench.batch), slots)

    def make(key: jax.Array) -> tuple[Any, ...]:
        sizes = (work.rows, work.heads, slots), *[(*rows, work.length)] * 2, *[(own, *rows, slots)] * 2
        keys = jax.random.split(key, len(sizes))
        random = (jax.random.normal(k, (*s, work.head_dim), dtype) for k, s in zip(keys, sizes, strict=True))
        last_BN = live.slots.positions_BN
        return *random, jnp.zeros_like(last_BN), last_BN, jnp.ones(own, bool)

    def function(queries, keys, values, own_keys, own_values, first_BN, last_BN, happened) -> jax.Array:
        args = queries, keys, values, first_BN, last_BN, own_keys, own_values, happened
        if backend == "reference":
            out = ttt_attention.reference(*args)
        else:
            out, _ = ttt_attention.attend(*args, dtype=dtype, mirror=None, backend=backend)  # type: ignore[arg-type]
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return Op(f"attention, {backend}", function, 5, make)


def loss(bench: Bench) -> Op:
    """Of all TTT steps at the live slots, from the states that lm_head reads."""
    work, program, batch = bench.work, bench.program, jax.tree.map(jnp.asarray, bench.batch)
    live = live_slots(program, batch, bench.width)
    chunk = objective.CPU_CHUNK if jax.default_backend() == "cpu" else objective.ACCELERATOR_CHUNK

    def make(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 4)
        states = (work.steps, work.rows, bench.width, work.width)
        hidden_KBNW = jax.random.normal(keys[0], states, program.dtype)
        lm_head_DW = jax.random.normal(keys[1], (work.draft_vocab, work.width)) / work.width**0.5
        head_DH = (jax.random.normal(keys[2], lm_head_DW.shape) / work.width**0.5).astype(program.dtype)
        last_BTH = jax.random.normal(keys[3], (*batch.tokens_BT.shape, work.width))
        return hidden_KBNW, lm_head_DW, head_DH, last_BTH

    def function(hidden_KBNW, lm_head_DW, head_DH, last_BTH) -> jax.Array:
        shape = batch.tokens_BT.shape
        counts_KBN = jnp.stack([c[jnp.arange(shape[0])[:, None], live.slots.positions_BN] for c in live.counts_KBT])
        step_K = jnp.arange(work.steps)[:, None, None]
        predictions = Predictions(hidden_KBNW, live.slots.positions_BN[None] + 1 + step_K, counts_KBN)
        features = Features(last_BTH[:, :, None], last_BTH, jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
        # The embedding is looked at for its length alone.
        tables = Tables(jnp.zeros((work.vocab, 0)), head_DH, jnp.arange(work.draft_vocab))
        switches = {"dtype": program.dtype, "slots": live.slots, "chunk_rows": chunk}
        given = predictions, features, batch, tables, lm_head_DW, live.teachers
        return objective.objective(program.objective, *given, **switches)[0]

    return Op("objective", function, 2, make)


def ops(bench: Bench, backends: list[str]) -> Iterator[Op]:
    for backend in backends:
        yield attention(bench, backend)
    yield loss(bench)


def main() -> None:
    parser = options(__doc__, WORKS, seconds=5.0, of="runs of each op")
    parser.add_argument("--length", type=int, help="T, in place of the work's")
    parser.add_argument(
        "--backend", choices=["chunked", "tpu", "gpu"], help="of attention (default: all that run here)"
    )
    args = begin(parser)
    work = dataclasses.replace(WORKS[args.work], length=args.length or WORKS[args.work].length)
    bench = bench_of(work, make_batch(work), args.dtype or work.dtype, remat=False)
    own = ttt_attention.BY_PLATFORM[jax.default_backend()]
    backends = [args.backend] if args.backend else list(dict.fromkeys(["reference", "chunked", own]))
    found = []
    for op in ops(bench, backends):
        found.append(op.measure(run=runs_here(args.work) and not args.compile_only, budget_s=args.seconds))
        print(json.dumps(found[-1]), flush=True)
    whole = {"work": args.work, "length": work.length, "slots": bench.width, "dtype": bench.program.dtype.name}
    print(
        json.dumps(whole | {"device": jax.devices()[0].device_kind, "ops": found, "peak_rss_bytes": peak_rss_bytes()})
    )


if __name__ == "__main__":
    main()
