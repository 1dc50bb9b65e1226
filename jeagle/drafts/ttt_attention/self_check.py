"""A kernel against the obvious form, on the device that is to run it: before a run trusts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jeagle.drafts.ttt_attention.op import BY_PLATFORM, Backend, attend
from jeagle.drafts.ttt_attention.reference import reference
from jeagle.interfaces import DraftSpec
from jeagle.runtime import distributed
from jeagle.runtime.mesh import platform, row_parts

GROUPS = 2  # of heads, at most: what more of them show is not worth their memory beside a loaded target
LENGTH, SLOTS = 640, 384  # several blocks of each, as every backend divides them
OWN = 3  # steps whose own keys exist; the last has not happened
WINDOW = 100
TOLERANCE = 2e-2  # relative to each array's largest value: the rounding of bfloat16 products, no wrong mask or scale
PAST_NAMES, OWN_NAMES = ("queries", "keys", "values"), ("own keys", "own values")

Arrays = dict[str, jax.Array]


def disproof(backend: Backend, dtype: Any, *, heads: int, kv_heads: int, head_dim: int) -> str:
    """Why a run must not trust `backend` with such heads here; empty where values and gradients are the reference's.

    Three rows, as packing, a sliding window, and a window that has moved on past a slot's own position leave them; with
    own keys of later steps, and without as in all layers but the deepest. Two programs are compiled: seconds.
    """
    groups = min(kv_heads, GROUPS)
    arrays = _arrays(heads // kv_heads * groups, groups, head_dim)

    def ours(*inputs: jax.Array) -> jax.Array:
        return attend(*inputs, dtype=dtype, mirror=None, backend=backend)[0].astype(jnp.float32)

    wanted = _by_reference(arrays)
    try:
        found = jax.device_get(jax.jit(_values_and_gradients(ours))(arrays))
    except Exception as error:  # whatever a compiler or driver may say: the run goes on without the kernel
        return f"it does not run ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    for name, array in jax.device_get(wanted).items():
        off = np.abs(found[name] - array).max() / np.abs(array).max()  # NumPy's, since XLA's CPU loses NaN in a max
        if not off <= TOLERANCE:  # NaN too
            return f"its {name} is off by {float(off):.2g} of the largest value"
    return ""


def attention_backend(mesh: Mesh | None) -> Backend:
    """The platform's backend; "chunked" where a mesh splits heads, since XLA cannot split a kernel over heads."""
    return BY_PLATFORM[platform(mesh)] if mesh is None or mesh.size == row_parts(mesh) else "chunked"


def trusted_backend(mesh: Mesh, spec: DraftSpec, dtype: Any) -> Backend:
    """`attention_backend`, or "chunked", with a note, where the kernel does not agree with the reference here."""
    backend = attention_backend(mesh)
    if backend == "chunked":
        return backend
    wrong = disproof(backend, dtype, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim)
    if wrong:
        print(f"note: the {backend} kernel of the TTT attention is not used: {wrong}; slower, not wrong", flush=True)
    return "chunked" if distributed.anywhere(bool(wrong)) else backend


def _arrays(heads: int, kv_heads: int, head_dim: int) -> Arrays:
    past, own = (3, kv_heads, LENGTH, head_dim), (OWN, 3, kv_heads, SLOTS, head_dim)
    shapes = (3, heads, SLOTS, head_dim), past, past, own, own
    keys, names = jax.random.split(jax.random.key(0), len(shapes)), (*PAST_NAMES, *OWN_NAMES)
    return {name: jax.random.normal(*of) for name, *of in zip(names, keys, shapes, strict=True)}


def _seen() -> tuple[np.ndarray, np.ndarray]:
    """First and last key of each slot, int32 [3, N] each. In the last row, a third see none of step 0: first > last."""
    rng = np.random.default_rng(0)
    last_BN = np.sort([rng.permutation(LENGTH)[:SLOTS] for _ in range(3)], axis=1)
    first_BN = np.where(last_BN < LENGTH // 3, 0, LENGTH // 3)
    first_BN[1] = np.maximum(first_BN[1], last_BN[1] - WINDOW + 1)
    first_BN[2, SLOTS // 3 : 2 * (SLOTS // 3)] = last_BN[2, SLOTS // 3 : 2 * (SLOTS // 3)] + 1
    return first_BN.astype(np.int32), last_BN.astype(np.int32)


def _values_and_gradients(attention: Callable[..., jax.Array]) -> Callable[[Arrays], Arrays]:
    """`attention`, as `reference` is called, with own keys and without -> what it gives and all gradients, by name."""
    first_BN, last_BN = _seen()

    def loss(arrays: Arrays) -> tuple[jax.Array, Arrays]:
        past, own = ([arrays[name] for name in names] for names in (PAST_NAMES, OWN_NAMES))
        with_own = attention(*past, first_BN, last_BN, *own, jnp.arange(OWN) < OWN - 1)
        # Who sees nothing has no softmax: without own keys, none may.
        none = [x[:0] for x in own]
        alone = attention(*past, np.minimum(first_BN, last_BN), last_BN, *none, jnp.ones(0, bool))
        return jnp.sum(jnp.sin(with_own) + jnp.cos(alone)), {"output": with_own, "output without own keys": alone}

    def both(arrays: Arrays) -> Arrays:
        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return outputs | {f"gradient of {name}": gradient for name, gradient in gradients.items()}

    return both


@jax.jit
def _by_reference(arrays: Arrays) -> Arrays:
    with jax.default_matmul_precision("highest"):
        return _values_and_gradients(reference)(arrays)
