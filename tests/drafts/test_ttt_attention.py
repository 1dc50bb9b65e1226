"""The backends of the TTT attention against the reference: values, gradients, and memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.drafts import ttt_attention
from jeagle.drafts.ttt_attention import chunked
from jeagle.drafts.ttt_attention.chunked import bands

CASES = {
    # batch, slots, length, query heads, key heads, head width, own keys, window
    "every slot": (2, 16, 16, 4, 2, 6, 3, 0),
    "live slots": (2, 8, 16, 4, 2, 6, 3, 0),
    "window": (1, 16, 16, 4, 4, 64, 2, 5),
    "one key head": (1, 8, 24, 6, 1, 128, 2, 0),
    "wide heads": (1, 8, 12, 2, 2, 256, 1, 0),
    "no own keys": (2, 16, 16, 4, 2, 6, 0, 0),
    "bands": (1, 256, 320, 2, 1, 8, 2, 0),
    "bands and window, in blocks": (1, 256, 256, 2, 1, 8, 2, 100),
}
KERNEL_CASES = {
    "all slots": (1, 256, 256, 4, 2, 64, 2, 0),
    "few slots, three heads a group, odd width": (2, 128, 384, 3, 1, 80, 1, 0),
    "window": (1, 384, 384, 2, 2, 64, 2, 100),
    "wide heads": (1, 128, 256, 2, 1, 256, 0, 0),
}


def inputs(case: str, dtype: str):
    """Two documents a row, slots at random positions."""
    batch, slots, length, heads, groups, width, own, window = (CASES | KERNEL_CASES)[case]
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    last = np.stack([np.sort(rng.permutation(length)[:slots]) for _ in range(batch)])
    boundary = rng.integers(1, length, (batch, 1))
    first = np.where(last >= boundary, boundary, 0)
    first = np.maximum(first, last - window + 1) if window else first
    queries, keys, values = normal(batch, heads, slots, width), *(normal(batch, groups, length, width) for _ in "kv")
    own_keys, own_values = (normal(own, batch, groups, slots, width) for _ in "kv")
    allowed = jnp.arange(own) < max(own - 1, 1)
    return (queries, keys, values, own_keys, own_values), jnp.asarray(first), jnp.asarray(last), allowed


def attend(*arrays, **switches):
    return ttt_attention.attend_ttt(*arrays, backward_carry=None, **switches)[0]


def value_and_gradients(function, case: str, dtype: str):
    arrays, first, last, happened = inputs(case, dtype)

    def loss(arrays):
        queries, keys, values, own_keys, own_values = arrays
        out = function(queries, keys, values, first, last, own_keys, own_values, happened)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return (out, *gradients)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5), ("bfloat16", 5e-2)])
def test_chunked_is_the_reference(case, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 16 if "blocks" in case else 4 if case == "live slots" else 128)
    is_the_reference(case, dtype, tolerance, "chunked")


@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("kernels", ["tpu", "gpu"])
def test_the_kernels_are_the_reference(case, dtype, tolerance, kernels):
    is_the_reference(case, dtype, tolerance, f"{kernels}_interpreted")


def is_the_reference(case, dtype, tolerance, backend):
    with jax.enable_x64(dtype == "float64"):
        given = "float64" if dtype == "float64" else "float32"
        ours = functools.partial(attend, dtype=dtype, backend=backend)
        expected = value_and_gradients(ttt_attention.reference, case, given)
        result = value_and_gradients(ours, case, given)
        assert result[0].dtype == dtype  # the result is in the type of the products, gradients in their inputs'
        assert all(a.dtype == b.dtype for a, b in zip(result[1:], expected[1:], strict=True))
        for a, b in zip(result, expected, strict=True):
            scale = max(1.0, float(jnp.abs(b).max())) if b.size else 1.0
            np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


H100 = jax.sharding.AbstractMesh(
    (1,),
    ("x",),
    (jax.sharding.AxisType.Explicit,),
    abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"),
)
"""JAX 0.11 asks the mesh which GPU it lowers for; before, any was right."""


def test_the_gpu_kernels_lower_for_cuda():
    """As far as Triton's own language, without a GPU; `benchmarks.gpu_kernels` goes on to machine code."""
    arrays, first, last, happened = inputs("few slots, three heads a group, odd width", "float32")

    def loss(arrays):
        queries, keys, values, own_keys, own_values = arrays
        given = queries, keys, values, first, last, own_keys, own_values, happened
        return jnp.sum(attend(*given, dtype="bfloat16", backend="gpu"))

    with jax.sharding.use_abstract_mesh(H100):
        text = jax.jit(jax.grad(loss)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("_forward_kernel", "_dqueries_kernel", "_dkeys_dvalues_kernel"):
        assert name in text


@pytest.mark.parametrize(("slots", "length"), [(192, 256), (512, 512), (208, 512), (1, 9), (97, 97), (4096, 4096)])
def test_bands_cover_every_slot_and_all_keys_that_it_can_attend_to(slots, length):
    parts = bands(slots, length)
    assert [n for start, stop, _ in parts for n in range(start, stop)] == list(range(slots))
    for _, stop, keys in parts:
        assert keys == length - (slots - stop)  # the slots behind the part take up at least so many positions


def test_memory_is_linear_in_length():
    """Twice the length takes twice the temporary memory, not four times: forward and backward."""

    def temporary(length: int) -> int:
        shape = jax.ShapeDtypeStruct
        past = shape((1, 2, length, 32), jnp.float32)
        queries, places = shape((1, 4, length, 32), jnp.float32), shape((1, length), jnp.int32)
        own, happened = shape((6, 1, 2, length, 32), jnp.float32), shape((6,), bool)

        def loss(queries, keys, values, own_keys, own_values, first, last, happened):
            out = attend(queries, keys, values, first, last, own_keys, own_values, happened, dtype=jnp.float32)
            return jnp.sum(out**2)

        function = jax.jit(jax.grad(loss, range(5)))
        compiled = function.lower(queries, past, past, own, own, places, places, happened).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.3 * temporary(4096)
