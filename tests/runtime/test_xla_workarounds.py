"""Each workaround computes what its plain form computes, ties, infinities and transposed results included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jeagle.runtime import xla_workarounds
from jeagle.runtime.xla_workarounds import add_matmul, argmax_by_blocks, contract_rows, flat_matmul, top_k_by_blocks


@pytest.mark.parametrize("size", [1, 63, 64, 128, 640])
def test_argmax_by_blocks_is_argmax(size):
    values = np.random.default_rng(size).integers(0, 9, (5, 7, size)).astype(np.float32)  # full of ties
    np.testing.assert_array_equal(argmax_by_blocks(jnp.asarray(values)), values.argmax(-1))


@pytest.mark.parametrize(
    ("size", "count", "values"), [(640, 4, 3), (640, 9, 9), (6400, 20, 10**6), (640, 640, 9), (63, 5, 3)]
)
def test_top_k_by_blocks_is_top_k(size, count, values):
    """Whether the largest entries are in few blocks or in many, and where more tie than are asked for."""
    drawn = np.random.default_rng(size + count).integers(0, values, (5, 7, size)).astype(np.float32)
    drawn[0, 0, : min(size, 70)] = values  # a block of them, and a part of the next
    ours, places = top_k_by_blocks(jnp.asarray(drawn), count)
    wanted, indices = jax.lax.top_k(jnp.asarray(drawn), count)
    np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(places, indices)


def test_infinities():
    values = np.full((3, 128), -np.inf, np.float32)
    values[1, 70], values[2, 127] = np.inf, -5.0
    np.testing.assert_array_equal(argmax_by_blocks(jnp.asarray(values)), [0, 70, 127])


@pytest.mark.parametrize("turned", [False, True])
def test_bfloat16_products_that_are_transposed_afterwards(turned):
    a, b = (
        np.random.default_rng(i).standard_normal((2, 48, 3, size)).astype(np.float32) for i, size in ((0, 96), (1, 640))
    )

    @jax.jit
    def gradient(a, b):
        product = contract_rows((a * 1).astype(jnp.bfloat16), (b * 1).astype(jnp.bfloat16))
        return (product.T if turned else product) + 1

    exact = np.einsum("bmki,bmko->io", *(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (a, b))) + 1
    np.testing.assert_allclose(gradient(a, b), exact.T if turned else exact, atol=1e-3)


def test_flat_matmul_either_way_round():
    x, matrix = np.random.default_rng(2).standard_normal((2, 5, 8)), np.random.default_rng(3).standard_normal((8, 6))
    for rows in (False, True):
        got = flat_matmul(jnp.float32(x), jnp.float32(matrix.T if rows else matrix), transposed=rows)
        np.testing.assert_allclose(got, x @ matrix, rtol=1e-5, atol=1e-5)


def test_add_matmul_in_pieces_that_no_mesh_splits(monkeypatch):
    """The last piece is narrower; where a mesh splits the columns, no device gathers the others' sums."""
    width, entries = 130, 64
    a = jax.random.normal(jax.random.key(0), (2, 3, width))
    b = jax.random.normal(jax.random.key(1), (2, 3, entries))
    sums = jnp.ones((width, entries))
    expected = add_matmul(sums, a, b)
    monkeypatch.setattr(xla_workarounds, "_LARGEST_PRODUCT", sums.size // 2)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    split, split_b = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "tensor"), (None, None, "tensor")))
    given = jax.device_put(sums, split), a, jax.device_put(b, split_b)
    run = jax.jit(add_matmul, out_shardings=split).lower(*given).compile()
    assert "all-gather" not in run.as_text()
    np.testing.assert_allclose(run(*given), expected, rtol=1e-5, atol=1e-6)  # sums of six products near 1
