"""Rematerialisation changes no gradient, whether `chunked_mlp` or a user's own class computes the MLP."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle.drafts import Eagle3, eagle3, trained_products, ttt
from jeagle.objective import resolve_objective
from jeagle.training import step
from tests.properties.test_devices import LENGTH, SPEC, case


class DoubledLayer(eagle3.DraftLayer):
    """A user's own layer."""

    def finish(self, residual, mixed):
        x, normed = self.attended(residual, mixed)
        gate, up = (normed @ kernel[...] for kernel in (self.mlp.gate_proj, self.mlp.up_proj))
        return x + 2 * (jax.nn.silu(gate) * up) @ self.mlp.down_proj[...]


class UsersDraft(Eagle3):
    def __init__(self, spec, dtype, rngs):
        super().__init__(spec, dtype, rngs)
        self.layers = nnx.List([DoubledLayer(spec, True, dtype, rngs)])


KINDS = {
    "two layers, the second with a window": (
        Eagle3,
        {"layers": 2, "sliding_window": 5, "layer_types": ("full_attention", "sliding_attention")},
    ),
    "the normed state is carried": (Eagle3, {"carry_normed": True, "norm_before_residual": True}),
    "a user's own layer": (UsersDraft, {}),
}


def gradient(kind, spec, remat: bool):
    graphdef, draft = nnx.split(kind(spec, jnp.dtype("float64"), nnx.Rngs(0)))
    program = step.Program(
        None, graphdef, spec.aux_layers, resolve_objective("jeagle"), 3, jnp.dtype("float64"), remat=remat
    )
    wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    draft, (batch, features, tables) = jax.tree.map(wide, (draft, case()))

    @jax.jit
    def run(draft):
        live = step.live_slots(program, batch, LENGTH)
        return step.draft_loss(program, draft, batch, features, tables, live)[0]

    return jax.value_and_grad(run)(draft)


@pytest.mark.parametrize("name", KINDS)
def test_rematerialisation_changes_no_gradient(name, monkeypatch):
    kind, switches = KINDS[name]
    monkeypatch.setattr(trained_products, "MLP_CHUNK", SPEC.mlp_width // 4)
    used = []
    monkeypatch.setattr(ttt, "chunked_mlp", lambda *args: used.append(1) or trained_products.chunked_mlp(*args))
    with jax.enable_x64(True):
        spec = dataclasses.replace(SPEC, **switches)
        (saved, expected), (recomputed, result) = (gradient(kind, spec, remat) for remat in (False, True))
        assert float(recomputed) == pytest.approx(float(saved), rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), result, expected)
    assert bool(used) == (kind is Eagle3)
