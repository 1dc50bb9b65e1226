"""`python -m benchmarks.tpu_step --topology v5e:2x4 --length 2048`: does a whole online training step fit a slice?

The real TPU compiler, run ahead of time on a CPU, compiles `jeagle.training.step.train_step` for Llama-3.1-8B and its
EAGLE-3 draft: target, TTT steps, loss, gradients, AdamW. Everything is supervised, the dearest case. Printed as JSON:

- memory of each chip, exact: what the compiler allots for arguments, results and temporary values;
- with --time seconds, an estimate: the target's as in `benchmarks.tpu_targets`; the draft's from one and two TTT steps
  without loops, by the compiler's own cycles for each instruction; the attention kernels by their FLOPs, at half of the
  peak.

Exit status 1 if it does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from benchmarks.tpu_targets import DTYPE, batch_of, estimate, shapes, slice_mesh  # first: it sets up the compiler

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.needed import needed_flops
from benchmarks.tpu_compiled import Parts, parts_of
from benchmarks.tpu_needed import KERNEL_SHARE, attention_seconds
from benchmarks.tpu_needed import needed_flops as target_flops
from benchmarks.tpu_shapes import CHIPS, MODELS, Case
from benchmarks.works import WORKS
from jeagle import objective
from jeagle.drafts import Eagle3, draft_sharding
from jeagle.interfaces import Features, Tables
from jeagle.runtime.clip import clip_by_global_norm
from jeagle.runtime.mesh import row_axes
from jeagle.targets import abstract_target, check_aux_layers
from jeagle.targets.families import read_spec
from jeagle.training.step import Frozen, Program, TrainState, draft_loss, live_slots, train_step, update

TARGET, TTT_STEPS = "llama-3.1-8b", 7


def optimiser() -> optax.GradientTransformation:
    return optax.chain(clip_by_global_norm(0.5), optax.adamw(1e-4, weight_decay=0.0))


def program_of(case: Case, mesh: Any, *, remat: bool) -> tuple[Program, TrainState, Frozen]:
    """The step's static part; its state and what it reads, as shapes on the slice."""
    spec = read_spec(MODELS[case.target])
    target = abstract_target(spec, DTYPE, stacked=True, mesh=mesh)
    aux_layers = check_aux_layers((), spec.layers)
    wanted = dataclasses.replace(WORKS["W3"].spec(), aux_layers=aux_layers)
    graphdef, draft = nnx.split(nnx.eval_shape(lambda: Eagle3(wanted, DTYPE, nnx.Rngs(0))))

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=draft_sharding(path, leaf.shape, mesh))

    draft = nnx.from_flat_state([(p, v.replace(placed(p, v.get_value()))) for p, v in nnx.to_flat_state(draft)])
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = jax.tree.map(
        lambda x: x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        optax.tree.map_params(optimiser(), lambda _, p: p, jax.eval_shape(optimiser().init, draft), draft),
    )
    zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    state = shapes(target, mesh)
    head = state["lm_head"].get_value()
    rows = jax.ShapeDtypeStruct((wanted.draft_vocab, spec.width), DTYPE, sharding=head.sharding)
    ids = jax.ShapeDtypeStruct((wanted.draft_vocab,), jnp.int32, sharding=everywhere)
    tables = Tables(state["embed_tokens"].get_value(), rows, ids)
    learnt = objective.DIALECTS["jeagle"]
    program = Program(
        target.graphdef, graphdef, aux_layers, learnt, TTT_STEPS, jnp.dtype(DTYPE), spec.logits, mesh=mesh, remat=remat
    )
    return program, TrainState(draft, moments, zero, zero), Frozen(state, tables)


def memory(case: Case, mesh: Any, *, remat: bool) -> dict[str, Any]:
    """GiB of each chip, from the whole program's compilation, and its FLOPs."""
    program, state, frozen = program_of(case, mesh, remat=remat)
    batch = batch_of(case, mesh)
    begun = time.monotonic()
    lowered = train_step.lower(program, optimiser(), state, frozen, batch, case.length)
    try:
        used = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, "why": " ".join(str(error).split())[:600]}
    own = used.output_size_in_bytes - used.alias_size_in_bytes  # the new state takes the old one's place
    parts = {"arguments": used.argument_size_in_bytes, "output": own, "temp": used.temp_size_in_bytes}
    limit = CHIPS[case.topology.split(":")[0]].memory
    return {
        "fits": sum(parts.values()) <= limit,
        **{f"{name}_gib": round(size / 2**30, 2) for name, size in parts.items()},
        "chip_gib": limit / 2**30,
        "compile_s": round(time.monotonic() - begun, 1),
    }


def draft_parts(case: Case, mesh: Any, steps: int, *, remat: bool) -> Parts:
    """Of everything behind the target's features: TTT steps, loss, gradients, update."""
    program, state, frozen = program_of(case, mesh, remat=remat)
    program = program._replace(ttt_steps=steps)
    rows, width, batch = NamedSharding(mesh, PartitionSpec(row_axes(mesh, case.rows))), 4096, batch_of(case, mesh)

    def shape(*sizes: int, kind: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.rows, case.length, *sizes), kind, sharding=rows)

    features = Features(shape(3, width, kind=DTYPE), shape(width), shape(kind=jnp.int32), shape())

    def run(state: Any, batch: Any, features: Any, tables: Any) -> Any:
        live = live_slots(program, batch, case.length)

        def loss_of(draft: Any) -> Any:
            return draft_loss(program, draft, batch, features, tables, live)

        return update(program, optimiser(), state, *jax.value_and_grad(loss_of, has_aux=True)(state.draft))

    return parts_of(run, state, batch, features, frozen.tables)


def seconds(case: Case, mesh: Any, *, remat: bool) -> dict[str, Any]:
    """The estimate, and what share of the needed FLOPs' roofline it reaches."""
    chip = CHIPS[case.topology.split(":")[0]]
    one, two = (draft_parts(case, mesh, steps, remat=remat) for steps in (1, 2))
    draft = one + (two - one) * (TTT_STEPS - 1)
    # The kernels of attention to step-0 keys, for which the compiler has no cycles: two products forward, three and
    # four backward, over half of the keys.
    products = 9 * TTT_STEPS * case.rows * case.length**2 * 4096
    kernels = products / mesh.size / (KERNEL_SHARE * chip.flops)
    kernels += attention_seconds(MODELS[case.target], case, mesh.size, chip)
    target = estimate(read_spec(MODELS[case.target]), case, mesh)
    work = dataclasses.replace(WORKS["W3"], rows=case.rows, length=case.length, steps=TTT_STEPS)
    whole = np.ones((case.rows, case.length), bool)
    needed_draft = needed_flops(work, np.broadcast_to(whole, (TTT_STEPS, *whole.shape)), whole)
    teacher = 2.0 * whole.size * work.width * work.vocab  # counted in both
    needed = needed_draft + target_flops(MODELS[case.target], case.rows, case.length) - teacher
    on_chip = (draft.cycles + target.cycles) / chip.clock + kernels
    links = (draft.link_bytes + target.link_bytes) / chip.links
    total, roofline = max(on_chip, links), needed / mesh.size / chip.flops
    return {
        "flops_needed": needed,
        "seconds_roofline": round(roofline, 4),
        "seconds": round(total, 4),
        "over_roofline": round(total / roofline, 3),
        "seconds_draft": round(draft.cycles / chip.clock, 4),
        "seconds_target": round(target.cycles / chip.clock, 4),
        "seconds_kernels": round(kernels, 4),
        "seconds_links": round(links, 4),
        "tokens_per_second_per_chip": round(case.rows * case.length / total / mesh.size),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="a slice: v5e:2x4, v5p:2x2x1, ...")
    parser.add_argument("--rows", type=int, default=8, help="B")
    parser.add_argument("--length", type=int, default=2048, help="T")
    parser.add_argument("--mesh", default="fsdp=-1", help="axes of the mesh: data, fsdp, expert, tensor; -1 = the rest")
    parser.add_argument("--remat", action="store_true", help="make the TTT steps' products anew in the backward pass")
    parser.add_argument("--time", action="store_true", help="estimate seconds too: six more compilations")
    args = parser.parse_args()
    case = Case(TARGET, args.topology, args.rows, args.length, args.mesh)
    mesh = slice_mesh(case.topology, case.mesh)
    found = dataclasses.asdict(case) | {"chips": mesh.size, "remat": args.remat} | memory(case, mesh, remat=args.remat)
    print(json.dumps(found), flush=True)
    if args.time:
        print(json.dumps(seconds(case, mesh, remat=args.remat)))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
