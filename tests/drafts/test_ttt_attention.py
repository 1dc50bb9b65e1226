"""The chunked TTT attention against the ten-line reference, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.drafts import ttt_attention


def inputs(dtype):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    allowed = jnp.asarray(np.tril(np.ones((8, 16), bool), 4)[None].repeat(2, 0))
    queries, keys, values = normal(2, 8, 4, 6), normal(2, 16, 2, 6), normal(2, 16, 2, 6)
    own = normal(3, 2, 8, 2, 6), normal(3, 2, 8, 2, 6)
    return (queries, keys, values, *own), allowed, jnp.array([True, True, False])


@pytest.mark.parametrize("block", [4, 8, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5), ("bfloat16", 5e-2)])
def test_chunked_is_the_reference(block, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        arrays, allowed, happened = inputs("float64" if dtype == "float64" else "float32")

        def loss(function, *arrays):
            queries, keys, values, own_keys, own_values = arrays
            out = function(queries, keys, values, allowed, own_keys, own_values, happened)
            return jnp.sum(jnp.sin(out)), out

        def chunked(*args):
            return ttt_attention.chunked(*args, dtype=jnp.dtype(dtype), block=block)

        wanted, found = (
            jax.value_and_grad(lambda *a, f=f: loss(f, *a), argnums=range(5), has_aux=True)(*arrays)
            for f in (ttt_attention.reference, chunked)
        )
        np.testing.assert_allclose(found[0][1], wanted[0][1], atol=tolerance)
        for ours, theirs in zip(found[1], wanted[1], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=tolerance)
