"""Compares a kernel with the reference on the device that is to run it, before a run relies on it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jeagle.drafts.ttt_attention.op import BY_PLATFORM, Backend, attend_ttt
from jeagle.drafts.ttt_attention.reference import reference
from jeagle.interfaces import DraftSpec
from jeagle.runtime import distributed
from jeagle.runtime.mesh import platform, row_parts

GROUPS = 2  # at most so many key heads: more would take memory beside a loaded target and show little
LENGTH, SLOTS = 640, 384  # several blocks of each for every backend
OWN_STEPS = 3  # steps with own keys; the last one is masked, as it is later than the step that is computed
WINDOW = 100
TOLERANCE = 2e-2  # relative to each array's largest value: bfloat16's rounding passes, a wrong mask or scale does not
STEP_0_NAMES, OWN_NAMES = ("queries", "keys", "values"), ("own keys", "own values")

Arrays = dict[str, jax.Array]


def kernel_fault(backend: Backend, dtype: Any, *, heads: int, kv_heads: int, head_dim: int) -> str:
    """What is wrong with `backend` for such heads on this device; "" where values and gradients are the reference's.

    The check has three rows: one as packing makes it, one with a sliding window, and one whose window has moved past a
    slot's own position. It runs with own keys of later steps, and without them as step 0 does. Compiling its two
    programs takes seconds.
    """
    groups = min(kv_heads, GROUPS)
    step_0, own = (3, groups, LENGTH, head_dim), (OWN_STEPS, 3, groups, SLOTS, head_dim)
    shapes = (3, heads // kv_heads * groups, SLOTS, head_dim), step_0, step_0, own, own
    keys, names = jax.random.split(jax.random.key(0), len(shapes)), (*STEP_0_NAMES, *OWN_NAMES)
    arrays = {name: jax.random.normal(*of) for name, *of in zip(names, keys, shapes, strict=True)}

    def ours(*inputs: jax.Array) -> jax.Array:
        return attend_ttt(*inputs, dtype=dtype, backward_carry=None, backend=backend)[0].astype(jnp.float32)

    expected = _by_reference(arrays)
    try:
        result = jax.device_get(jax.jit(_values_and_gradients(ours))(arrays))
    except Exception as error:  # of any kind from compiler or driver: the run goes on without the kernel
        return f"it does not run ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    for name, array in jax.device_get(expected).items():
        # NumPy's maximum, since that of XLA's CPU backend loses NaN.
        difference = np.abs(result[name] - array).max() / np.abs(array).max()
        if not difference <= TOLERANCE:  # which holds for NaN, too
            return f"its {name} is off by {float(difference):.2g} of the largest value"
    return ""


def attention_backend(mesh: Mesh | None) -> Backend:
    """The platform's backend; "chunked" where a mesh splits heads, since XLA cannot split a kernel over heads."""
    return BY_PLATFORM[platform(mesh)] if mesh is None or mesh.size == row_parts(mesh) else "chunked"


def trusted_backend(mesh: Mesh, spec: DraftSpec, dtype: Any) -> Backend:
    """`attention_backend`, or "chunked", with a note, where the kernel does not agree with the reference here."""
    backend = attention_backend(mesh)
    if backend == "chunked":
        return backend
    fault = kernel_fault(backend, dtype, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim)
    if fault:
        print(f"note: the {backend} kernel of the TTT attention is not used: {fault}; slower, not wrong", flush=True)
    return "chunked" if distributed.anywhere(bool(fault)) else backend


def _visible() -> tuple[jax.Array, jax.Array]:
    """The first and the last position of each slot's keys, int32 [3, N] each.

    In the last row, a third of the slots attend to no step-0 key: first > last.
    """
    rng = np.random.default_rng(0)
    last_BN = np.sort([rng.permutation(LENGTH)[:SLOTS] for _ in range(3)], axis=1)
    first_BN = np.where(last_BN < LENGTH // 3, 0, LENGTH // 3)
    first_BN[1] = np.maximum(first_BN[1], last_BN[1] - WINDOW + 1)
    first_BN[2, SLOTS // 3 : 2 * (SLOTS // 3)] = last_BN[2, SLOTS // 3 : 2 * (SLOTS // 3)] + 1
    return jnp.asarray(first_BN, jnp.int32), jnp.asarray(last_BN, jnp.int32)


def _values_and_gradients(attention: Callable[..., jax.Array]) -> Callable[[Arrays], Arrays]:
    """The results of `attention`, called as `reference` is, with own keys and without, and all gradients; by name."""
    first_BN, last_BN = _visible()

    def loss(arrays: Arrays) -> tuple[jax.Array, Arrays]:
        step_0, own = ([arrays[name] for name in names] for names in (STEP_0_NAMES, OWN_NAMES))
        with_own = attention(*step_0, first_BN, last_BN, *own, jnp.arange(OWN_STEPS) < OWN_STEPS - 1)
        # A slot without any key has no softmax: without own keys, each must attend to some step-0 key.
        none = [x[:0] for x in own]
        without_own = attention(*step_0, jnp.minimum(first_BN, last_BN), last_BN, *none, jnp.ones(0, bool))
        outputs = {"output": with_own, "output without own keys": without_own}
        return jnp.sum(jnp.sin(with_own) + jnp.cos(without_own)), outputs

    def both(arrays: Arrays) -> Arrays:
        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return outputs | {f"gradient of {name}": gradient for name, gradient in gradients.items()}

    return both


@jax.jit
def _by_reference(arrays: Arrays) -> Arrays:
    with jax.default_matmul_precision("highest"):
        return _values_and_gradients(reference)(arrays)
