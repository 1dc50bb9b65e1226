"""The whole loss, TTT steps and all, against finite differences in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle.drafts import Eagle3
from jeagle.objective import resolve
from jeagle.training import step
from tests.properties.test_devices import LENGTH, SPEC, case


@pytest.mark.parametrize(("remat", "window"), [(False, 0), (True, 3)])
def test_gradients_are_finite_differences(remat, window):
    """Along a random direction of each parameter by itself; live slots fewer than positions, documents packed."""
    spec = dataclasses.replace(SPEC, sliding_window=window)
    with jax.enable_x64(True):
        graphdef, draft = nnx.split(Eagle3(spec, jnp.dtype("float64"), nnx.Rngs(0)))
        program = step.Program(None, graphdef, SPEC.aux_layers, resolve("jeagle"), 4, jnp.dtype("float64"), remat=remat)
        wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        draft, (batch, features, tables) = jax.tree.map(wide, (draft, case()))
        rng = np.random.default_rng(1)
        draft = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape), draft)

        @jax.jit
        def loss(draft):
            live = step.live_slots(program, batch, LENGTH - 4)
            return step.draft_loss(program, draft, batch, features, tables, live)[0]

        leaves, tree = jax.tree.flatten(draft)
        gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(draft))
        for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            direction = rng.standard_normal(leaf.shape)
            direction *= 1e-4 / np.linalg.norm(direction)
            ahead, behind = (
                loss(jax.tree.unflatten(tree, [*leaves[:i], leaf + s * direction, *leaves[i + 1 :]])) for s in (1, -1)
            )
            assert float((ahead - behind) / 2) == pytest.approx(
                float((gradient * direction).sum()), rel=1e-6, abs=1e-13
            )
