"""A kernel against the chunked code, on the device that is to run it: before a run trusts it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jeagle.drafts.ttt_attention.op import Backend, attend

LENGTH, SLOTS, OWN = 256, 128, 1
TOLERANCE = 5e-2  # relative to each array's largest value: the rounding of bfloat16 products, no wrong mask or scale


def disproof(backend: Backend, dtype: Any, *, heads: int, kv_heads: int, head_dim: int) -> str:
    """Why a run must not trust `backend` with such heads here; empty where values and gradients are the chunked code's.

    One row of two documents, every other position a slot. A second or two, compilation included.
    """
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = {
        "queries": (1, heads, SLOTS, head_dim),
        "keys": (1, kv_heads, LENGTH, head_dim),
        "values": (1, kv_heads, LENGTH, head_dim),
        "own keys": (OWN, 1, kv_heads, SLOTS, head_dim),
        "own values": (OWN, 1, kv_heads, SLOTS, head_dim),
    }
    arrays = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    last = jnp.arange(0, LENGTH, LENGTH // SLOTS)[None]
    first = jnp.where(last < LENGTH // 3, 0, LENGTH // 3)

    def given_by(chosen: Backend) -> dict[str, jax.Array]:
        def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            past = arrays["queries"], arrays["keys"], arrays["values"], first, last
            own = arrays["own keys"], arrays["own values"], jnp.ones(OWN, bool)
            out, _ = attend(*past, *own, dtype=dtype, mirror=None, backend=chosen)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return {"output": out, **{f"gradient of {name}": gradient for name, gradient in gradients.items()}}

    wanted = given_by("chunked")
    try:
        found = jax.block_until_ready(given_by(backend))
    except Exception as error:  # whatever a compiler or driver may say: the run goes on without the kernel
        return f"it does not run ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    for name, array in wanted.items():
        off = jnp.abs(found[name].astype(jnp.float32) - array).max() / jnp.abs(array).max()
        if not off <= TOLERANCE:  # NaN too
            return f"its {name} is off by {float(off):.2g} of the largest value"
    return ""
