"""A family's scale and soft cap of logits reach the teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.interfaces import LogitShape
from jeagle.objective.chunked import Recipe, Taught, chunked_loss


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(0.125, 0.0), LogitShape(1.0, 3.0), LogitShape(2.0, 5.0)])
def test_teacher_is_the_softmax_of_the_shaped_logits(shape):
    rng = np.random.default_rng(0)
    hidden, last = rng.normal(size=(2, 1, 4, 8)), rng.normal(size=(1, 4, 8))
    head, own = 3 * rng.normal(size=(11, 8)), rng.normal(size=(11, 8))
    raw = last @ head.T * shape.scale
    logits = shape.cap * np.tanh(raw / shape.cap) if shape.cap else raw
    teacher = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = np.moveaxis(hidden, 0, 2) @ own.T
    wanted = (np.log(np.exp(scores).sum(-1)) - (teacher[:, :, None] * scores).sum(-1)).sum()
    taught = Taught(
        jnp.asarray(last),
        jnp.asarray(head),
        jax.nn.logsumexp(jnp.asarray(logits), axis=-1),
        jnp.zeros((1, 4), jnp.int32),
        jnp.ones((1, 4, 2)),
        jnp.broadcast_to(jnp.arange(4)[:, None], (1, 4, 2)),
    )
    recipe = Recipe(((1.0, "soft_ce"),), False, jnp.float32, 2, shape)
    loss, _ = chunked_loss(recipe, jnp.asarray(hidden), jnp.asarray(own), taught)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
