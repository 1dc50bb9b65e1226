"""What a store leaves out changes nothing."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import align, features
from jeagle.drafts import Eagle3
from jeagle.interfaces import Batch, DraftSpec, Tables
from jeagle.objective import resolve
from jeagle.training import step
from tests.features import made

SPEC = DraftSpec(made.HIDDEN, 16, made.VOCAB, 20, (1, 2, 3), heads=4, kv_heads=2, head_dim=4, mlp_width=24, layers=2)
STEPS, CHOSEN = 2, np.arange(0, 40, 2, dtype=np.int32)
SLOTS = "specforge"  # whose slots need the most


def read(url: Path, form: str) -> tuple[Batch, features.Stored]:
    """All rows of a store that is made now, and their features."""
    made.fill(url, form)
    store = features.Store(str(url))
    batch = store.batch("train", range(store.rows("train")))
    return batch, store.stored("train", range(store.rows("train")), batch)


def test_taps_that_nothing_sees_change_nothing(tmp_path):
    """Turns after the last answer, and documents without one, keep no taps; of all others every one counts."""
    batch, whole = read(tmp_path / "whole", "float32")
    _, seen = read(tmp_path / "seen", "exact, seen")
    left_out = (batch.segments_BT > 0) & ~align.seen_positions(batch, xp=np)
    assert left_out.sum() > 20 and not seen.aux.values[left_out].any() and whole.aux.values[left_out].all()

    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((n, 16), np.float32) for n in (made.VOCAB, len(CHOSEN)))
    frozen = step.Frozen(None, jax.tree.map(jnp.asarray, Tables(*rows, CHOSEN)))
    graphdef, draft = nnx.split(Eagle3(SPEC, jnp.float32, nnx.Rngs(0)))
    program = step.Program(None, graphdef, SPEC.aux_layers, resolve("jeagle", slots=SLOTS), STEPS, jnp.dtype("float32"))

    @jax.jit
    def run(batch, stored):
        return step.loss_gradient(program, draft, frozen, batch, made.LENGTH, stored)

    wanted, found = run(batch, whole), run(batch, seen)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert float(wanted[0][1].counting.sum()) > 50
    live = align.counting_slots(batch, STEPS, SLOTS, xp=np).any(axis=0)
    row, place = np.argwhere(live)[-1]
    seen.aux.values[row, place] = 0
    assert not np.allclose(run(batch, seen)[0][0], wanted[0][0], rtol=1e-6)
