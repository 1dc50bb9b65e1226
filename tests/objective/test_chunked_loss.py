"""The chunked loss against plain autodiff of the same sum over all logits; names of losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.errors import UserError
from jeagle.interfaces import LogitShape
from jeagle.objective.chunked_loss import LossOptions, TeacherPositions, chunked_loss
from jeagle.objective.losses import ALIASES, LOSSES, TeacherProbs, overlap, parse_loss, weighted_sum

K, B, N, M, W, D, H, V = 3, 2, 9, 8, 6, 20, 5, 40


def case():
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((K, B, N, W)), rng.standard_normal((D, W))
    target_head = rng.standard_normal((V, H))
    last = rng.standard_normal((B, M, H))
    logits = last @ target_head.T
    teachers = TeacherPositions(
        source=jnp.asarray(last),
        head_DH=jnp.asarray(target_head[:D]),
        lse_BM=jax.nn.logsumexp(jnp.asarray(logits), axis=-1),
        label_BM=jnp.asarray(np.where(logits.argmax(-1) < D, logits.argmax(-1), -1)),
        weight_BMK=jnp.asarray(rng.random((B, M, K)) * (rng.random((B, M, K)) < 0.7)),
        slot_BMK=jnp.asarray(rng.permuted(np.tile(np.arange(N)[:, None], (B, 1, K)), axis=1)[:, :M]),
    )
    return jnp.asarray(hidden), jnp.asarray(head), teachers


@pytest.mark.parametrize("loss", [*LOSSES, "0.3*kl+0.7*tv"])
@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_values_and_gradients(loss, chunk):
    with jax.enable_x64(True):
        hidden, head, teachers = case()
        terms = parse_loss(loss)

        def dense(hidden, head):
            teacher_logits = (teachers.source @ teachers.head_DH.T)[:, :, None]
            full = jnp.exp(teacher_logits - teachers.lse_BM[..., None, None])
            teacher = TeacherProbs(jax.nn.softmax(teacher_logits, axis=-1), full)
            by_teacher = hidden[jnp.arange(K), jnp.arange(B)[:, None, None], teachers.slot_BMK]
            logits = by_teacher @ head.T
            accepted = overlap(logits, full)
            return jnp.sum(weighted_sum(terms)(logits, teacher) * teachers.weight_BMK), accepted

        def by_chunks(hidden, head):
            total, metrics = chunked_loss(LossOptions(terms, False, jnp.float64, chunk), hidden, head, teachers)
            return 3.0 * total, metrics.accepted  # the factor reaches the backward pass

        (expected, accepted), gradients = jax.value_and_grad(dense, (0, 1), has_aux=True)(hidden, head)
        (value, ours), our_gradients = jax.jit(jax.value_and_grad(by_chunks, (0, 1), has_aux=True))(hidden, head)
        assert float(value) == pytest.approx(3 * float(expected), rel=1e-10)
        np.testing.assert_allclose(ours, accepted, atol=1e-10)
        for a, b in zip(our_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, 3 * b, atol=1e-10)


def test_no_vocabulary_wide_array_outlives_its_chunk():
    """In the compiled gradient no buffer holds B x M x K x D numbers, or half of them."""
    hidden, head, teachers = jax.tree.map(lambda x: x, case())
    options = LossOptions((((1.0, "soft_ce")),), False, jnp.float32, 1)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: chunked_loss(options, h, w, teachers)[0], (0, 1)))(hidden, head)
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    assert max(sizes) < K * B * M * D / 2


def test_the_names_of_other_trainers_are_the_same_losses():
    """As speculators 0.9.0 (loss_fn) and SpecForge 0.2.0 (lk_loss_type) write them."""
    for theirs, ours in ALIASES.items():
        assert parse_loss(theirs) == parse_loss(ours) == ((1.0, ours),)
        assert theirs not in LOSSES  # an alias hides no loss of ours
    assert parse_loss("0.1*ce + 0.9*tv") == ((0.1, "hard_ce"), (0.9, "tv"))
    assert {"kl_div", "rkl", "jsd", "ce", "lk_hybrid", "alpha", "lambda"} == set(ALIASES)


def test_unknown_loss_is_named():
    with pytest.raises(UserError, match="soft_cee"):
        parse_loss("soft_cee")
    with pytest.raises(UserError, match="not a number"):
        parse_loss("x*kl")


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(0.125, 0.0), LogitShape(1.0, 3.0), LogitShape(2.0, 5.0)])
def test_teacher_is_the_softmax_of_the_shaped_logits(shape):
    """A family's scale and soft cap of logits reach the teacher."""
    rng = np.random.default_rng(0)
    hidden, last = rng.normal(size=(2, 1, 4, 8)), rng.normal(size=(1, 4, 8))
    head, own = 3 * rng.normal(size=(11, 8)), rng.normal(size=(11, 8))
    raw = last @ head.T * shape.scale
    logits = shape.cap * np.tanh(raw / shape.cap) if shape.cap else raw
    teacher = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = np.moveaxis(hidden, 0, 2) @ own.T
    expected = (np.log(np.exp(scores).sum(-1)) - (teacher[:, :, None] * scores).sum(-1)).sum()
    teachers = TeacherPositions(
        jnp.asarray(last),
        jnp.asarray(head),
        jax.nn.logsumexp(jnp.asarray(logits), axis=-1),
        jnp.zeros((1, 4), jnp.int32),
        jnp.ones((1, 4, 2)),
        jnp.broadcast_to(jnp.arange(4)[:, None], (1, 4, 2)),
    )
    options = LossOptions(((1.0, "soft_ce"),), False, jnp.float32, 2, shape)
    loss, _ = chunked_loss(options, jnp.asarray(hidden), jnp.asarray(own), teachers)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
