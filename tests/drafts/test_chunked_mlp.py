"""The lean MLP against plain autodiff over several steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jeagle.drafts import chunked_mlp as room
from jeagle.drafts.chunked_mlp import Kernels, lean_mlp

STEPS, ROWS, SLOTS, WIDTH, INNER = 3, 2, 5, 6, 24


def case():
    rng = np.random.default_rng(0)
    shapes = Kernels((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))
    kernels = Kernels(*(jnp.asarray(rng.standard_normal(shape) / 4) for shape in shapes))
    return jnp.asarray(rng.standard_normal((ROWS, SLOTS, WIDTH))), kernels


def plain(x, kernels: Kernels):
    """Steps that read their own outputs, through the same kernels."""
    for _ in range(STEPS):
        x = x + (jax.nn.silu(x @ kernels.gate_WF) * (x @ kernels.up_WF)) @ kernels.down_FW
    return jnp.sum(jnp.sin(x))


def lean(x, kernels: Kernels, dtype="float64"):
    frozen = jax.lax.stop_gradient(kernels)

    def step(carry, _):
        x, passed = carry
        y, passed = lean_mlp(jnp.dtype(dtype), x.astype(dtype), frozen, passed)
        return (x + y, passed), None

    (x, _), _ = jax.lax.scan(step, (x, kernels), None, length=STEPS)
    return jnp.sum(jnp.sin(x))


@pytest.mark.parametrize("widest", [INNER, 8, 7, 1])
def test_values_and_gradients(widest, monkeypatch):
    monkeypatch.setattr(room, "WIDEST", widest)
    with jax.enable_x64(True):
        x, kernels = case()
        wanted, gradients = jax.value_and_grad(plain, (0, 1))(x, kernels)
        found, ours = jax.jit(jax.value_and_grad(lean, (0, 1)))(x, kernels)
        assert float(found) == pytest.approx(float(wanted), rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, gradients)


def test_gradients_are_summed_in_float32(monkeypatch):
    """Of bfloat16 products: what they lose is their own rounding, not the sum's."""
    monkeypatch.setattr(room, "WIDEST", 8)
    x, kernels = jax.tree.map(lambda leaf: jnp.float32(leaf) / 2, case())  # so small that the steps amplify little
    wanted = jax.grad(plain, 1)(x, kernels)
    found = jax.grad(lambda x, kernels: lean(x, kernels, "bfloat16"), 1)(x, kernels)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))


def test_nothing_is_as_wide_as_the_mlp(monkeypatch):
    """But for the kernels' own sums, no array of the gradient has all of the inner width."""
    monkeypatch.setattr(room, "WIDEST", 8)
    x, kernels = jax.tree.map(jnp.float32, case())
    jaxpr = jax.make_jaxpr(jax.grad(lean, (0, 1)), static_argnums=2)(x, kernels, "float32")
    widths = {v.aval.shape for eqn in _equations(jaxpr.jaxpr) for v in eqn.outvars if INNER in v.aval.shape}
    assert widths == {(WIDTH, INNER), (INNER, WIDTH)}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)
