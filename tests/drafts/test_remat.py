"""Products made anew in the backward pass, by a lean MLP or one of the user's own, change no gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle.drafts import Eagle3, chunked_mlp, eagle3, ttt
from jeagle.objective import resolve
from jeagle.training import step
from tests.properties.test_devices import LENGTH, SPEC, case


class Doubled(eagle3.Layer):
    """A user's own MLP."""

    def finish(self, residual, mixed):
        x, normed = self.attended(residual, mixed)
        gate, up = (normed @ kernel[...] for kernel in (self.mlp.gate_proj, self.mlp.up_proj))
        return x + 2 * (jax.nn.silu(gate) * up) @ self.mlp.down_proj[...]


class Own(Eagle3):
    def __init__(self, spec, dtype, rngs):
        super().__init__(spec, dtype, rngs)
        self.layers = nnx.List([Doubled(spec, True, dtype, rngs)])


KINDS = {
    "two layers, a window": (Eagle3, {"layers": 2, "sliding_window": 5}),
    "the normed state handed on": (Eagle3, {"carry_normed": True, "norm_before_residual": True}),
    "a layer of the user's own": (Own, {}),
}


def gradient(kind, spec, remat: bool):
    graphdef, draft = nnx.split(kind(spec, jnp.dtype("float64"), nnx.Rngs(0)))
    program = step.Program(None, graphdef, spec.aux_layers, resolve("jeagle"), 3, jnp.dtype("float64"), remat=remat)
    wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    draft, (batch, features, tables) = jax.tree.map(wide, (draft, case()))

    @jax.jit
    def run(draft):
        live = step.live_slots(program, batch, LENGTH)
        return step.draft_loss(program, draft, batch, features, tables, live)[0]

    return jax.value_and_grad(run)(draft)


@pytest.mark.parametrize("name", KINDS)
def test_remat_changes_no_gradient(name, monkeypatch):
    kind, switches = KINDS[name]
    monkeypatch.setattr(chunked_mlp, "WIDEST", SPEC.mlp_width // 4)
    used = []
    monkeypatch.setattr(ttt, "lean_mlp", lambda *given: used.append(1) or chunked_mlp.lean_mlp(*given))
    with jax.enable_x64(True):
        spec = dataclasses.replace(SPEC, **switches)
        (kept, wanted), (again, found) = (gradient(kind, spec, remat) for remat in (False, True))
        assert float(again) == pytest.approx(float(kept), rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, wanted)
    assert bool(used) == (kind is Eagle3)
