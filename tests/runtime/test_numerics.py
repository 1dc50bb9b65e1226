"""first_largest is jnp.argmax, ties and sizes that do not divide included."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.runtime.numerics import first_largest


@pytest.mark.parametrize("size", [1, 63, 64, 128, 640])
def test_first_largest_is_argmax(size):
    values = np.random.default_rng(size).integers(0, 9, (5, 7, size)).astype(np.float32)  # full of ties
    np.testing.assert_array_equal(first_largest(jnp.asarray(values)), values.argmax(-1))


def test_infinities():
    values = np.full((3, 128), -np.inf, np.float32)
    values[1, 70], values[2, 127] = np.inf, -5.0
    np.testing.assert_array_equal(first_largest(jnp.asarray(values)), [0, 70, 127])
