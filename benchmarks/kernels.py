"""The TTT attention's kernels through a chip's own compiler, none of which needs the chip.

Forward and backward at the shapes of a Llama-3.1-8B draft and at heads of other widths; compiling shows that the
kernels fit a chip's memories and lower at all. `tests/drafts/test_ttt_attention.py` checks their numbers, in interpret
mode.
"""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jeagle.drafts import ttt_attention

DTYPE = jnp.bfloat16
# slots, length, query heads, key heads, head width
SHAPES = (
    (2048, 2048, 32, 8, 128),
    (640, 2048, 32, 8, 128),
    (8192, 8192, 32, 8, 128),
    (2048, 2048, 16, 2, 64),
    (2048, 2048, 8, 4, 256),
)


def compile_all(device: Any, chip: str, backend: ttt_attention.Backend) -> bool:
    """Whether every shape compiles for a device; one JSON object each."""
    fine = True
    for sizes in SHAPES:
        found = {"chip": chip, "sizes": sizes}
        try:
            found["compile_s"] = round(_compile_seconds(device, backend, *sizes), 1)
        except jax.errors.JaxRuntimeError as error:
            fine, found["error"] = False, " ".join(str(error).split())[:400]
        print(json.dumps(found), flush=True)
    return fine


def _compile_seconds(
    device: Any, backend: ttt_attention.Backend, slots: int, length: int, heads: int, groups: int, width: int
) -> float:
    place = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())

    def shape(*sizes: int, kind: object = DTYPE) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, kind, sharding=place)

    past, own, place_BN = shape(1, groups, length, width), shape(6, 1, groups, slots, width), (1, slots)

    def loss(queries, keys, values, own_keys, own_values, first, last, happened):
        given = (queries, keys, values, first, last, own_keys, own_values, happened)
        out, _ = ttt_attention.attend_ttt(*given, dtype=DTYPE, backward_carry=None, backend=backend)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    seen = shape(*place_BN, kind=jnp.int32)
    begun = time.monotonic()
    given = (shape(1, heads, slots, width), past, past, own, own, seen, seen, shape(6, kind=jnp.bool_))
    jax.jit(jax.value_and_grad(loss, range(5))).lower(*given).compile()
    return time.monotonic() - begun
