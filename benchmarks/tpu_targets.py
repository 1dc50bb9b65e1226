"""`python -m benchmarks.tpu_targets --target llama-3.1-8b --topology v5e:2x4`: does a target's forward fit a slice?

The real TPU compiler, run ahead of time on a CPU, compiles what a training step asks of the frozen target: taps, last
states, greedy tokens and logsumexps of a batch of packed rows, the weights sharded over the slice. Printed as JSON:

- memory of each chip, exact: what the compiler allots for arguments, results and temporary values;
- FLOPs, counted from the program's jaxpr, beside a count by hand of what is needed;
- seconds, an estimate: the compiler's cycles for each instruction of pieces without loops (one and two layers of each
  kind, one and two chunks of the vocabulary pass), extrapolated to all of them. Kernels, for which it has none: the
  experts' products by the roofline, attention at half of the peak; bytes between chips by the published rate of their
  links, at best all hidden behind the work.

Without --target all of `benchmarks.tpu_shapes.CASES` in turn. Exit status 1 if any does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no cloud's metadata is wanted
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.tpu_compiled import Parts, compiled, parts_of
from benchmarks.tpu_needed import attention_seconds, expert_seconds, needed_flops
from benchmarks.tpu_shapes import CASES, CHIPS, MODELS, Case, Chip
from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.runtime.flops import flops_of
from jeagle.runtime.mesh import make_mesh, row_axes, row_sharding
from jeagle.targets import TargetSpec, abstract_target, check_aux_layers
from jeagle.targets.checkpoint.layout import layouts
from jeagle.targets.checkpoint.load import Target
from jeagle.targets.families import read_spec
from jeagle.targets.model import features
from jeagle.targets.model.features import ACCELERATOR_CHUNK, distributions

DTYPE = jnp.bfloat16


def slice_mesh(topology: str, axes: str) -> Mesh:
    """The mesh "fsdp=4,tensor=2" of the devices of "v5e:2x4"."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    return make_mesh(**({"fsdp": 1} | sizes), devices=devices)


def shapes(target: Target, mesh: Mesh) -> Any:
    """The target's state as shapes with the types and shardings that loading it would give."""
    found = layouts(target.model(), target.state, mesh, DTYPE, "dtype")
    leaves = []
    for path, leaf in nnx.to_flat_state(target.state):
        layout = found[path]
        shape, sharding = leaf.get_value().shape, layout.sharding
        if layout.stacked:
            sharding = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
        leaves.append((path, leaf.replace(jax.ShapeDtypeStruct(shape, layout.dtype, sharding=sharding))))
    return nnx.from_flat_state(leaves)


def batch_of(case: Case, mesh: Mesh) -> Batch:
    def whole(kind: Any) -> Any:
        return jax.ShapeDtypeStruct((case.rows, case.length), kind, sharding=row_sharding(mesh))

    return Batch(whole(jnp.int32), whole(jnp.int32), whole(jnp.int32), whole(jnp.bool_))


def feature_program(target: Target, aux_layers: tuple[int, ...]) -> Callable[[Any, Batch], Any]:
    """(state, batch) -> Features, every position wanted."""

    def run(state: Any, batch: Batch) -> Any:
        wanted = jnp.ones(batch.tokens_BT.shape, bool)
        return features(nnx.merge(target.graphdef, state), batch, aux_layers, wanted, wanted.shape[1])

    return run


def measured(case: Case) -> dict[str, Any]:
    """All figures of a case; `fits` false, with the compiler's reason, where memory does not suffice."""
    mesh, chip = slice_mesh(case.topology, case.mesh), CHIPS[case.topology.split(":")[0]]
    config = MODELS[case.target]
    spec = read_spec(config)
    found = dataclasses.asdict(case) | {"chips": mesh.size, "chip_gib": chip.memory / 2**30}
    started = time.monotonic()
    found |= memory(spec, case, mesh, chip)
    found |= {"compile_s": round(time.monotonic() - started, 1)}
    if not found["fits"]:
        return found
    counted, needed = counted_flops(spec, case), needed_flops(config, case.rows, case.length)
    parts = estimate(spec, case, mesh)
    kernels = expert_seconds(config, case, mesh.size, mesh.shape["expert"], chip)
    kernels += attention_seconds(config, case, mesh.size, chip)
    on_chip, links = parts.cycles / chip.clock + kernels, parts.link_bytes / chip.links
    seconds = max(on_chip, links)
    return found | {
        "flops_jaxpr": counted,
        "flops_needed": needed,
        "jaxpr_over_needed": round(counted / needed, 3),
        "seconds": round(seconds, 4),
        "seconds_on_chip": round(on_chip, 4),
        "seconds_of_kernels": round(kernels, 4),
        "seconds_of_links": round(links, 4),
        "tokens_per_second": round(case.rows * case.length / seconds),
        "roofline_share": round(needed / (seconds * mesh.size * chip.flops), 3),
    }


def memory(spec: TargetSpec, case: Case, mesh: Mesh, chip: Chip) -> dict[str, Any]:
    """GiB of each chip, from the whole program's compilation."""
    target = abstract_target(spec, DTYPE, stacked=True, mesh=mesh)
    run = feature_program(target, check_aux_layers((), spec.layers))
    rows = NamedSharding(mesh, PartitionSpec(row_axes(mesh, case.rows) or None))
    try:
        used = compiled(run, (shapes(target, mesh), batch_of(case, mesh)), rows).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, "why": " ".join(str(error).split())[:300]}
    sizes = [used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes]
    names = ("arguments_gib", "output_gib", "temp_gib")
    return {"fits": sum(sizes) <= chip.memory} | {
        name: round(size / 2**30, 2) for name, size in zip(names, sizes, strict=True)
    }


def counted_flops(spec: TargetSpec, case: Case) -> int:
    """FLOPs of the program before it is laid out on chips, from its jaxpr."""
    target = abstract_target(spec, DTYPE, stacked=True)
    whole = jax.ShapeDtypeStruct((case.rows, case.length), jnp.int32)
    batch = Batch(whole, whole, whole, jax.ShapeDtypeStruct(whole.shape, bool))
    return flops_of(feature_program(target, check_aux_layers((), spec.layers)), target.state, batch)


def estimate(spec: TargetSpec, case: Case, mesh: Mesh) -> Parts:
    """Cycles and link bytes of the whole, from pieces: each kind of layer once and twice, one and two chunks."""
    total = Parts()
    for kind in dict.fromkeys(spec.blocks):
        one, two = (_layers(dataclasses.replace(spec, blocks=(kind,) * n), case, mesh) for n in (1, 2))
        rest = one - (two - one) if kind == spec.blocks[0] else Parts()  # embedding and final norm, once
        total += rest + (two - one) * spec.blocks.count(kind)
    parts = math.prod(mesh.shape[axis] for axis in row_axes(mesh, case.rows))
    chunk = min(case.length, ACCELERATOR_CHUNK * parts // case.rows)  # positions of each row
    one, two = (_vocabulary(spec, case.rows, n * chunk, mesh) for n in (1, 2))
    return total + one + (two - one) * (case.length / chunk - 1)


def _layers(spec: TargetSpec, case: Case, mesh: Mesh) -> Parts:
    """Of embedding, these layers and the final norm."""
    target = abstract_target(spec, DTYPE, stacked=True, mesh=mesh)

    def run(state: Any, batch: Batch) -> Any:
        model = nnx.merge(target.graphdef, state)
        return model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, (1,))

    return parts_of(run, shapes(target, mesh), batch_of(case, mesh))


def _vocabulary(spec: TargetSpec, rows: int, positions: int, mesh: Mesh) -> Parts:
    """Of greedy tokens and logsumexps at so many positions of each row."""
    target = abstract_target(dataclasses.replace(spec, blocks=()), DTYPE, stacked=True, mesh=mesh)
    place = NamedSharding(mesh, PartitionSpec(row_axes(mesh, rows) or None))
    last = jax.ShapeDtypeStruct((rows, positions, spec.width), jnp.float32, sharding=place)

    def run(state: Any, last: jax.Array) -> Any:
        return distributions(nnx.merge(target.graphdef, state), last)[:2]

    return parts_of(run, shapes(target, mesh), last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=MODELS, help="a published target; without it all cases of the table")
    parser.add_argument("--topology", default="v5e:2x4", help="a slice: v5e:2x4, v6e:2x4, v5p:4x4x2, ...")
    parser.add_argument("--rows", type=int, default=8, help="B")
    parser.add_argument("--length", type=int, default=2048, help="T")
    parser.add_argument("--mesh", default="fsdp=-1", help="axes of the mesh: data, fsdp, expert, tensor; -1 = the rest")
    args = parser.parse_args()
    own = Case(args.target, args.topology, args.rows, args.length, args.mesh)
    fits = True
    for case in (own,) if args.target else CASES:
        found = measured(case)
        fits &= found["fits"]
        print(json.dumps(found), flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
