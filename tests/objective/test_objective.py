"""The objective against plain sums over whole logits: normalisers, temperature, and losses of more than one slot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import align
from jeagle.errors import UserError
from jeagle.interfaces import Batch, Features, Predictions, Tables
from jeagle.objective import LOSSES, divisors, objective, resolve_objective
from jeagle.objective.losses import TeacherProbs

K, B, T, W, H, D, V = 3, 2, 12, 5, 4, 7, 9
NORMALISERS = ("all_slots", "counting", "document")


class World:
    """Two packed rows of three documents, float64."""

    def __init__(self):
        rng = np.random.default_rng(0)
        segments = np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
        supervised = np.array([[0, 0, 1, 1, 1] + [0] + [1] * 6, [0, 0] + [1] * 5 + [0, 1] + [0] * 3], bool)
        zeros = np.zeros((B, T), np.int32)
        self.batch = Batch(zeros, jnp.asarray(segments), zeros, jnp.asarray(supervised))
        self.hidden, self.head = jnp.asarray(rng.normal(size=(K, B, T, W))), jnp.asarray(rng.normal(size=(D, W)))
        self.last, target_head = jnp.asarray(rng.normal(size=(B, T, H))), rng.normal(size=(V, H))
        self.target_head = jnp.asarray(target_head)
        logits = self.last @ target_head.T
        self.features = Features(
            jnp.zeros((B, T, 1, H)), self.last, jnp.argmax(logits, -1), jax.nn.logsumexp(logits, axis=-1)
        )
        self.tables = Tables(jnp.zeros((V, W)), jnp.asarray(target_head[:D]), jnp.arange(D))
        self.counts = align.counting_slots(self.batch, K, "served")
        self.reads = align.read_positions(self.batch.segments_BT, K)
        self.everywhere = align.Selected(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), bool))

    def found(self, spec, hidden, head, **more):
        predictions = Predictions(hidden, self.reads, self.counts)
        given = spec, predictions, self.features, self.batch, self.tables, head, self.everywhere
        return objective(*given, dtype=jnp.float64, slots=self.everywhere, **more)

    def slotwise(self, spec, hidden, head):
        """(teacher, draft's logits [K, B, T, D], which slots carry loss)."""
        reads = jnp.minimum(self.reads, T - 1)
        last = self.last[jnp.arange(B)[None, :, None], reads]
        lse = self.features.lse_BT[jnp.arange(B)[None, :, None], reads]
        logits = last @ self.tables.head_DH.T
        full = jnp.exp(logits - lse[..., None])
        return TeacherProbs(jax.nn.softmax(logits / spec.temperature, axis=-1), full), hidden @ head.T, self.counts

    def mean(self, spec, values, carries):
        """What the normaliser makes of each step's losses, [K]."""
        values = jnp.where(carries, values, 0.0)
        if spec.normaliser == "all_slots":
            return values.sum((1, 2)) / (B * T)
        if spec.normaliser == "counting":
            return values.sum((1, 2)) / carries.sum((1, 2))
        means = []
        for k in range(K):
            own = [carries[k] & (self.batch.segments_BT == s) & (np.arange(B)[:, None] == b) for b, s in DOCUMENTS]
            means.append(jnp.stack([jnp.where(o, values[k], 0.0).sum() / o.sum() for o in own if o.any()]).mean())
        return jnp.stack(means)


DOCUMENTS = ((0, 1), (0, 2), (1, 1))


@pytest.fixture(scope="module")
def world():
    with jax.enable_x64(True):
        yield World()


def check(world, spec, dense):
    """The objective's value, steps and gradients are those of `dense`: (hidden, head) -> each step's loss [K]."""

    def total(hidden, head):
        steps = dense(hidden, head)
        return jnp.sum(steps * spec.decay ** np.arange(K)), steps

    both = (0, 1)
    (wanted, steps), gradients = jax.value_and_grad(total, both, has_aux=True)(world.hidden, world.head)
    (value, metrics), ours = jax.value_and_grad(lambda h, w: world.found(spec, h, w), both, has_aux=True)(
        world.hidden, world.head
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-6)  # the figures and scales are float32
    np.testing.assert_allclose(metrics.loss, steps, rtol=1e-5)
    for a, b in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    return metrics


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_normalisers(world, normaliser):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", normaliser=normaliser, loss="0.3*kl+0.7*js")

        def dense(hidden, head):
            teacher, logits, carries = world.slotwise(spec, hidden, head)
            loss = 0.3 * LOSSES["kl"](logits, teacher) + 0.7 * LOSSES["js"](logits, teacher)
            return world.mean(spec, loss, carries)

        check(world, spec, dense)


def test_temperature_softens_what_is_learnt_and_not_what_is_accepted(world):
    with jax.enable_x64(True):
        spec, plain = resolve_objective("jeagle", temperature=2.5), resolve_objective("jeagle")

        def dense(hidden, head):
            teacher, logits, carries = world.slotwise(spec, hidden, head)
            log_q = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            return world.mean(spec, -(teacher.probs * log_q).sum(-1), carries)

        metrics = check(world, spec, dense)
        _, untouched = world.found(plain, world.hidden, world.head)
        np.testing.assert_allclose(metrics.accepted, untouched.accepted, rtol=1e-6)
        assert not np.allclose(metrics.loss, untouched.loss, rtol=1e-3)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("loss", ["length", "0.5*length+2*soft_ce"])
def test_length_is_minus_the_product_of_the_acceptances_so_far(world, normaliser, loss):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", normaliser=normaliser, loss=loss, decay=0.7)
        share = {name: weight for weight, name in spec.terms()}

        def dense(hidden, head):
            teacher, logits, carries = world.slotwise(spec, hidden, head)
            accepted = jnp.minimum(teacher.full_probs, jax.nn.softmax(logits, axis=-1)).sum(-1)
            products = [accepted[: k + 1].prod(axis=0) for k in range(K)]
            loss = -share["length"] * jnp.stack(products)
            if "soft_ce" in share:
                loss = loss + share["soft_ce"] * LOSSES["soft_ce"](logits, teacher)
            return world.mean(spec, loss, carries)

        check(world, spec, dense)


def test_expected_length_of_the_figures_is_that_of_the_products(world):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", loss="length", decay=1.0)
        value, metrics = world.found(spec, world.hidden, world.head)
        expected = 1 + np.sum(metrics.prefix_accepted / metrics.prefix_counting)
        assert expected == pytest.approx(1 - float(value), rel=1e-6)
        assert 1 < expected < 1 + K


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_lk_step_mixes_by_the_mean_acceptance_of_the_step(world, normaliser):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", normaliser=normaliser, loss="lk_step", lk_scale=0.9, lk_decay=2.0)

        def dense(hidden, head):
            teacher, logits, carries = world.slotwise(spec, hidden, head)
            accepted = jnp.minimum(teacher.full_probs, jax.nn.softmax(logits, axis=-1)).sum(-1)
            rate_K = jnp.where(carries, accepted, 0.0).sum((1, 2)) / carries.sum((1, 2))
            w_K = 0.9 * jnp.exp(-2.0 * jax.lax.stop_gradient(rate_K))
            return w_K * world.mean(spec, LOSSES["soft_ce"](logits, teacher), carries) + (1 - w_K) * (1 - rate_K)

        check(world, spec, dense)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_divisors_of_the_whole_batch_serve_each_of_its_parts(world, normaliser):
    """Rows taken one at a time with the whole batch's divisors sum to the loss of both."""
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", normaliser=normaliser)
        whole, metrics = world.found(spec, world.hidden, world.head)
        divisor_K = divisors(spec, world.counts, world.batch.segments_BT, (B, T))
        parts = []
        for keep in (0, 1):
            only = world.counts & (jnp.arange(B) == keep)[:, None]
            predictions = Predictions(world.hidden, world.reads, only)
            given = spec, predictions, world.features, world.batch, world.tables, world.head, world.everywhere
            parts.append(objective(*given, dtype=jnp.float64, slots=world.everywhere, divisor_K=divisor_K))
        assert float(parts[0][0] + parts[1][0]) == pytest.approx(float(whole), rel=1e-6)
        np.testing.assert_allclose(parts[0][1].loss + parts[1][1].loss, metrics.loss, rtol=1e-6)


def test_temperature_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="above 0"):
        resolve_objective("jeagle", temperature=0.0)
    with pytest.raises(UserError, match="renormalised"):
        resolve_objective("jeagle", temperature=2.0, loss="kl+0.1*length")
    assert resolve_objective("jeagle", temperature=2.0, loss="lk", renormalised=True).temperature == 2.0
