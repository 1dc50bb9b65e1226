"""first_largest is argmax and largest top_k, ties included; products in bfloat16 hold whatever their callers do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.runtime.numerics import first_largest, largest, rows_product, summed_product


@pytest.mark.parametrize("size", [1, 63, 64, 128, 640])
def test_first_largest_is_argmax(size):
    values = np.random.default_rng(size).integers(0, 9, (5, 7, size)).astype(np.float32)  # full of ties
    np.testing.assert_array_equal(first_largest(jnp.asarray(values)), values.argmax(-1))


@pytest.mark.parametrize(
    ("size", "count", "values"), [(640, 4, 3), (640, 9, 9), (6400, 20, 10**6), (640, 640, 9), (63, 5, 3)]
)
def test_largest_is_top_k(size, count, values):
    """Whether the largest stand in few blocks or in many, and where more are as large than are wanted."""
    drawn = np.random.default_rng(size + count).integers(0, values, (5, 7, size)).astype(np.float32)
    drawn[0, 0, : min(size, 70)] = values  # a block of them, and a part of the next
    ours, places = largest(jnp.asarray(drawn), count)
    wanted, indices = jax.lax.top_k(jnp.asarray(drawn), count)
    np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(places, indices)


def test_infinities():
    values = np.full((3, 128), -np.inf, np.float32)
    values[1, 70], values[2, 127] = np.inf, -5.0
    np.testing.assert_array_equal(first_largest(jnp.asarray(values)), [0, 70, 127])


@pytest.mark.parametrize("turned", [False, True])
def test_bfloat16_products_that_are_transposed_afterwards(turned):
    a, b = (
        np.random.default_rng(i).standard_normal((2, 48, 3, size)).astype(np.float32) for i, size in ((0, 96), (1, 640))
    )

    @jax.jit
    def gradient(a, b):
        product = summed_product((a * 1).astype(jnp.bfloat16), (b * 1).astype(jnp.bfloat16))
        return (product.T if turned else product) + 1

    exact = np.einsum("bmki,bmko->io", *(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (a, b))) + 1
    np.testing.assert_allclose(gradient(a, b), exact.T if turned else exact, atol=1e-3)


def test_rows_product_either_way_round():
    x, matrix = np.random.default_rng(2).standard_normal((2, 5, 8)), np.random.default_rng(3).standard_normal((8, 6))
    for rows in (False, True):
        got = rows_product(jnp.float32(x), jnp.float32(matrix.T if rows else matrix), rows=rows)
        np.testing.assert_allclose(got, x @ matrix, rtol=1e-5, atol=1e-5)
