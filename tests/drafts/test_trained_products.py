"""Products with hand-written backward passes against plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jeagle.drafts import trained_products
from jeagle.drafts.trained_products import MLPKernels, chunked_mlp, scaled_linear, trained_linear

STEPS, ROWS, SLOTS, WIDTH, INNER = 3, 2, 5, 6, 24


def case():
    rng = np.random.default_rng(0)
    shapes = MLPKernels((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))
    kernels = MLPKernels(*(jnp.asarray(rng.standard_normal(shape) / 4) for shape in shapes))
    return jnp.asarray(rng.standard_normal((ROWS, SLOTS, WIDTH))), kernels


def plain_mlp(x, kernels: MLPKernels):
    """Steps that read their own outputs, through the same kernels."""
    for _ in range(STEPS):
        x = x + (jax.nn.silu(x @ kernels.gate_WF) * (x @ kernels.up_WF)) @ kernels.down_FW
    return jnp.sum(jnp.sin(x))


def chunked(x, kernels: MLPKernels, dtype="float64"):
    frozen = jax.lax.stop_gradient(kernels)

    def step(carry, _):
        x, carried = carry
        y, carried = chunked_mlp(jnp.dtype(dtype), x.astype(dtype), frozen, carried)
        return (x + y, carried), None

    (x, _), _ = jax.lax.scan(step, (x, kernels), None, length=STEPS)
    return jnp.sum(jnp.sin(x))


@pytest.mark.parametrize("chunk", [INNER, 8, 7, 1])
def test_chunked_mlp_is_the_plain_mlp(chunk, monkeypatch):
    monkeypatch.setattr(trained_products, "MLP_CHUNK", chunk)
    with jax.enable_x64(True):
        x, kernels = case()
        expected, gradients = jax.value_and_grad(plain_mlp, (0, 1))(x, kernels)
        result, ours = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, kernels)
        assert float(result) == pytest.approx(float(expected), rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, gradients)


@pytest.mark.parametrize("outputs", [3, 9])
def test_linear_is_the_plain_product(outputs):
    """Kernels wider and narrower than the input: the order of the gradient's operands depends on it."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, scale, kernel = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 5, 6), (6,), (6, outputs)))
        ours = jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(trained_linear(x, kernel))), (0, 1))(x, kernel)
        plain = jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(x @ kernel)), (0, 1))(x, kernel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, plain)
        ours = jax.value_and_grad(lambda s, kernel: jnp.sum(jnp.sin(scaled_linear(x, s, kernel))), (0, 1))
        plain = jax.value_and_grad(lambda s, kernel: jnp.sum(jnp.sin((x * s) @ kernel)), (0, 1))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours(scale, kernel), plain(scale, kernel)
        )


def test_gradients_are_summed_in_float32(monkeypatch):
    """With bfloat16 products, gradients lose no more than the products' own rounding."""
    monkeypatch.setattr(trained_products, "MLP_CHUNK", 8)
    x, kernels = jax.tree.map(
        lambda leaf: jnp.float32(leaf) / 2, case()
    )  # small numbers, so that the steps amplify little
    expected = jax.grad(plain_mlp, 1)(x, kernels)
    result = jax.grad(lambda x, kernels: chunked(x, kernels, "bfloat16"), 1)(x, kernels)
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))


def test_no_array_but_the_kernels_sums_is_as_wide_as_the_mlp(monkeypatch):
    """Only the kernels' sums have the whole inner width."""
    monkeypatch.setattr(trained_products, "MLP_CHUNK", 8)
    x, kernels = jax.tree.map(jnp.float32, case())
    jaxpr = jax.make_jaxpr(jax.grad(chunked, (0, 1)), static_argnums=2)(x, kernels, "float32")
    widths = {v.aval.shape for eqn in _equations(jaxpr.jaxpr) for v in eqn.outvars if INNER in v.aval.shape}
    assert widths == {(WIDTH, INNER), (INNER, WIDTH)}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)
