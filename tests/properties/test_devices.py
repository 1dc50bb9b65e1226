"""The loss, its figures and its gradients are those of one device, however the rows lie on a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle.drafts import Eagle3, constrain_draft
from jeagle.interfaces import Batch, DraftSpec, Features, Tables, TopK
from jeagle.objective import resolve
from jeagle.runtime.mesh import make_mesh, row_sharding
from jeagle.training import step

ROWS, LENGTH, VOCAB = 4, 16, 40
SPEC = DraftSpec(16, 16, VOCAB, 20, (1, 2, 3), heads=4, kv_heads=2, head_dim=4, mlp_width=24)


def case():
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    segments = np.repeat([[1, 2]], [9, 5], axis=1).repeat(ROWS, 0)
    segments = np.pad(segments, ((0, 0), (0, 2))).astype(np.int32)
    positions = np.where(segments == 2, np.arange(LENGTH) - 9, np.arange(LENGTH)).astype(np.int32)
    # Rows differ in how much of them is learnt: a mean of means would not be the mean.
    supervised = (rng.random(shape) < np.linspace(0.4, 1.0, ROWS)[:, None]) & (segments > 0)
    batch = Batch(rng.integers(0, VOCAB, shape, np.int32), segments, positions, supervised)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    head, last = normal(VOCAB, 16), normal(*shape, 16)
    logits = last @ head.T
    lse = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    features = Features(normal(*shape, 3, 16), last, logits.argmax(-1).astype(np.int32), lse)
    chosen = np.sort(rng.permutation(VOCAB)[:20]).astype(np.int32)
    return jax.tree.map(jnp.asarray, (batch, features, Tables(normal(VOCAB, 16), head[chosen], chosen)))


def likeliest(last: jax.Array, head: np.ndarray, kept: int) -> TopK:
    """What a store keeps of the distributions, some of them without any token of the draft vocabulary."""
    values, ids = jax.lax.top_k(jax.nn.log_softmax(last @ head.T), kept)
    return TopK(ids, values, 1 - jnp.exp(values).sum(-1))


def loss_and_gradient(mesh, normaliser: str, remat: bool, kept: int = 0):
    graphdef, draft = nnx.split(Eagle3(SPEC, jnp.float32, nnx.Rngs(0)))
    spec = resolve("jeagle", normaliser=normaliser, slots="predicted")
    program = step.Program(None, graphdef, SPEC.aux_layers, spec, 3, jnp.dtype("float32"), mesh=mesh, remat=remat)
    batch, features, tables = case()
    if kept:
        own = np.random.default_rng(1).standard_normal((VOCAB, 16), np.float32)
        features = features._replace(teacher=likeliest(features.teacher, own, kept))
    if mesh is not None:
        batch, features = jax.device_put((batch, features), row_sharding(mesh))

    @jax.jit
    def run(draft, batch, features, tables):
        live = step.live_slots(program, batch, LENGTH)
        loss = functools.partial(step.draft_loss, program)
        found = jax.value_and_grad(loss, has_aux=True)(draft, batch, features, tables, live)
        return found[0], constrain_draft(found[1], mesh)

    return run(draft, batch, features, tables)


@functools.cache
def alone(normaliser: str, kept: int = 0):
    return loss_and_gradient(None, normaliser, False, kept)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("axes", "normaliser", "kept"),
    [
        ({"fsdp": 4}, "counting", 0),
        ({"fsdp": 4}, "document", 0),
        ({"fsdp": 4}, "all_slots", 0),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "counting", 0),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "document", 2),
    ],
)
def test_a_mesh_changes_nothing(axes, normaliser, kept):
    size = int(np.prod(list(axes.values())))
    mesh = make_mesh(**({"fsdp": 1} | axes), devices=jax.devices()[:size])
    found, wanted = loss_and_gradient(mesh, normaliser, False, kept), alone(normaliser, kept)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_running_steps_again_changes_nothing():
    found, wanted = loss_and_gradient(None, "counting", True), alone("counting")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
