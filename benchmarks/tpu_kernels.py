"""`python -m benchmarks.tpu_kernels`: the TTT attention's kernels through the real TPU compiler, for every chip.

Forward and backward at the shapes of a Llama-3.1-8B draft; compiling shows that the kernels fit each chip's vector
memory and lower at all. `tests/drafts/test_ttt_attention.py` checks their numbers, in interpret mode. Printed as JSON;
exit status 1 if any does not compile.
"""

from __future__ import annotations

import json
import sys
import time

from benchmarks.tpu_targets import DTYPE, slice_mesh  # first: it sets up the compiler

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jeagle.drafts import ttt_attention

CHIPS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1")
# slots, length, query heads, key heads, head width
SHAPES = ((2048, 2048, 32, 8, 128), (640, 2048, 32, 8, 128), (8192, 8192, 32, 8, 128), (2048, 2048, 16, 2, 64))


def compile_seconds(topology: str, slots: int, length: int, heads: int, groups: int, width: int) -> float:
    devices = slice_mesh(topology, "fsdp=-1").devices.flatten()[:1]
    place = NamedSharding(jax.sharding.Mesh(devices, ("chip",)), PartitionSpec())

    def shape(*sizes: int, kind: object = DTYPE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, kind, sharding=place)

    past, own, place_BN = shape(1, groups, length, width), shape(6, 1, groups, slots, width), (1, slots)

    def loss(queries, keys, values, own_keys, own_values, first, last, happened):
        given = (queries, keys, values, first, last, own_keys, own_values, happened)
        return jnp.sum(
            ttt_attention.attend(*given, dtype=DTYPE, mirror=None, backend="tpu")[0].astype(jnp.float32) ** 2
        )

    seen = shape(*place_BN, kind=jnp.int32)
    begun = time.monotonic()
    given = (shape(1, heads, slots, width), past, past, own, own, seen, seen, shape(6, kind=jnp.bool_))
    jax.jit(jax.value_and_grad(loss, range(5))).lower(*given).compile()
    return time.monotonic() - begun


def main() -> int:
    status = 0
    for topology in CHIPS:
        for sizes in SHAPES:
            found = {"chip": topology.split(":")[0], "sizes": sizes}
            try:
                found["compile_s"] = round(compile_seconds(topology, *sizes), 1)
            except jax.errors.JaxRuntimeError as error:
                status, found["error"] = 1, " ".join(str(error).split())[:400]
            print(json.dumps(found), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
