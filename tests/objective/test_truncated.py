"""A teacher of which only the likeliest tokens are known: with all it is the whole one, with few what they say."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.interfaces import Predictions, TopK
from jeagle.objective import LOSSES, divisors, objective, resolve_objective
from jeagle.objective.chunked_loss import LossOptions, TeacherPositions, TruncatedTeacher, chunked_loss
from jeagle.objective.losses import TeacherProbs, parse_loss, weighted_sum
from tests.objective.test_objective import NORMALISERS, K, T, V, W, World, check

DRAFT = [1, 2, 5, 8]
ALL = "+".join(f"{i}*{name}" for i, name in enumerate(LOSSES, 1))
FINITE = "+".join(f"{i}*{name}" for i, name in enumerate(LOSSES, 1) if name != "reverse_kl")


class Truncated(World):
    """The same world with a small draft vocabulary; the `kept` likeliest tokens of each distribution teach."""

    def __init__(self, kept: int):
        super().__init__()
        self.whole = self.features
        self.tables = self.tables._replace(
            draft_to_target_D=jnp.asarray(DRAFT), head_DH=self.target_head[np.array(DRAFT)]
        )
        self.head = jnp.asarray(np.random.default_rng(1).normal(size=(len(DRAFT), W)))
        logits = self.last @ self.target_head.T - self.features.lse_BT[..., None]
        values, ids = jax.lax.top_k(logits, kept)
        self.features = self.features._replace(teacher=TopK(ids, values, 1 - jnp.exp(values).sum(-1)))

    def slotwise(self, spec, hidden, head):
        """What is known, written down plainly: zeros elsewhere; slots of which nothing is known carry no loss."""
        rows, reads = jnp.arange(len(self.last))[None, :, None], jnp.minimum(self.reads, T - 1)
        own = jnp.exp(self.last @ self.target_head.T - self.features.lse_BT[..., None])
        full = own[..., self.tables.draft_to_target_D][rows, reads]
        ids = self.features.teacher.ids_BTP[rows, reads]
        full = jnp.where((ids[..., None] == self.tables.draft_to_target_D).any(-2), full, 0.0)
        known = full.sum(-1) > 0
        softened = full ** (1 / spec.temperature)
        probs = softened / jnp.where(known, softened.sum(-1), 1.0)[..., None]
        return TeacherProbs(probs, full), hidden @ head.T, self.counts & known


@pytest.fixture(scope="module")
def few():
    with jax.enable_x64(True):
        yield Truncated(2)


@pytest.fixture(scope="module")
def every():
    with jax.enable_x64(True):
        yield Truncated(V)


def both(world, spec):
    """(loss, figures), gradients."""
    found = jax.value_and_grad(lambda h, w: world.found(spec, h, w), (0, 1), has_aux=True)
    return jax.jit(found)(world.hidden, world.head)


SPECS = [
    {"loss": ALL},
    {"loss": "length+2*lk_step"},
    {"temperature": 2.5},
    {"renormalised": True, "loss": "lk"},
    {"mask_out_of_vocab": True, "normaliser": "document"},
]


@pytest.mark.parametrize("switches", SPECS, ids=str)
def test_with_every_token_it_is_the_whole_teacher(every, switches):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", **switches)
        (ours, metrics), gradient = both(every, spec)
        truncated, every.features = every.features, every.whole
        (wanted, expected), wanted_gradient = both(every, spec)
        every.features = truncated
        # A slot's acceptance passes through float32 where a loss depends on other slots'.
        exact = 1e-6 if "length" in spec.loss else 1e-10
        np.testing.assert_allclose(ours, wanted, rtol=exact)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=exact)
        for name, a, b in zip(metrics._fields, metrics, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("switches", [{"loss": FINITE}, {"loss": "kl+2*js", "temperature": 1.7}], ids=str)
def test_with_few_tokens_it_is_what_they_say(few, switches):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", **switches)
        check(few, spec, lambda h, w: dense(few, spec, h, w))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_slots_that_are_told_nothing_cost_nothing_and_are_counted(few, normaliser):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", normaliser=normaliser)
        carries = few.slotwise(spec, few.hidden, few.head)[2]
        assert 0 < int((few.counts & ~carries).sum()) < int(few.counts.sum())
        metrics = check(few, spec, lambda h, w: dense(few, spec, h, w))
        np.testing.assert_array_equal(metrics.trained, few.counts.sum((1, 2)))


def dense(world, spec, hidden, head):
    """Each step's loss [K] from whole logits."""
    teacher, logits, carries = world.slotwise(spec, hidden, head)
    values = jnp.where(carries, weighted_sum(parse_loss(spec.loss))(logits, teacher), 0.0)
    return world.mean(spec, values, world.counts)


def test_length_is_minus_the_product_of_what_is_surely_accepted(few):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle", loss="length", decay=0.7)

        def steps(hidden, head):
            teacher, logits, _ = few.slotwise(spec, hidden, head)
            accepted = jnp.minimum(teacher.full_probs, jax.nn.softmax(logits, axis=-1)).sum(-1)
            return few.mean(spec, -jnp.cumprod(accepted, axis=0), few.counts)

        check(few, spec, steps)


def test_gradients_are_those_of_finite_differences(few):
    with jax.enable_x64(True):
        # lk's share of KL is held fixed in its gradient
        spec, rng = resolve_objective("jeagle", loss=FINITE, lk_scale=0.0), np.random.default_rng(5)
        way, step = (rng.normal(size=few.hidden.shape), rng.normal(size=few.head.shape)), 1e-4

        @jax.jit
        def at(distance):
            return few.found(spec, few.hidden + distance * way[0], few.head + distance * way[1])[0]

        _, gradient = both(few, spec)
        along = sum(float((g * w).sum()) for g, w in zip(gradient, way, strict=True))
        assert along == pytest.approx(float(at(step) - at(-step)) / (2 * step), rel=1e-5)


def test_acceptance_is_understated_by_the_rest_at_most(few):
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle")
        (_, ours), _ = both(few, spec)
        truncated, few.features = few.features, few.whole
        (_, metrics), _ = both(few, spec)
        few.features = truncated
        rest = few.features.teacher.rest_BT[jnp.arange(2)[None, :, None], jnp.minimum(few.reads, T - 1)]
        most = jnp.where(few.counts, rest, 0.0).sum((1, 2))
        missing = metrics.accepted - ours.accepted
        assert (missing >= -1e-6).all() and (missing <= most + 1e-6).all() and missing.max() > 0.05
        np.testing.assert_array_equal(ours.correct, metrics.correct)


def test_nothing_vocabulary_wide_outlives_its_chunk():
    """In the compiled gradient no buffer holds B x M x D numbers, or half of them."""
    rows, width, kept, size = 2, 16, 3, 400
    ones = functools.partial(jnp.ones, dtype=jnp.float32)
    known = TruncatedTeacher(ones((rows, width, kept)).astype(int), -ones((rows, width, kept)))
    zeros = ones((rows, width)) * 0
    slots = jnp.broadcast_to(jnp.arange(width)[:, None], (rows, width, K))
    teachers = TeacherPositions(known, ones((size, 4)), zeros, zeros.astype(int), ones((rows, width, K)), slots)
    options = LossOptions(((1.0, "soft_ce"),), False, jnp.float32, 1)
    hidden, head = ones((K, rows, width, 4)), ones((size, 4))
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: chunked_loss(options, h, w, teachers)[0], (0, 1)))(hidden, head)
    assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) < rows * width * size / 2


def test_the_draft_vocabulary_may_change_after_the_fact(few):
    """Entries are looked up by token: another draft vocabulary, in another place, is another teacher."""
    with jax.enable_x64(True):
        spec, kept = resolve_objective("jeagle"), few.tables
        (_, before), _ = both(few, spec)
        few.tables = kept._replace(draft_to_target_D=kept.draft_to_target_D - 1, head_DH=kept.head_DH + jnp.nan)
        try:
            metrics = check(few, spec, lambda h, w: dense(few, spec, h, w))
        finally:
            few.tables = kept
        assert not np.allclose(metrics.accepted, before.accepted, rtol=1e-3)


def test_a_loss_that_needs_every_probability_is_named():
    assert "reverse_kl" in resolve_objective("jeagle", loss="0.5*kl+0.5*reverse_kl").needs_full_teacher
    assert not resolve_objective("jeagle", loss="0.5*kl+0.5*tv").needs_full_teacher


def test_objective_takes_part_of_a_batch(few):
    """Rows one at a time with the whole batch's divisors, as accumulation takes them."""
    with jax.enable_x64(True):
        spec = resolve_objective("jeagle")
        whole, _ = few.found(spec, few.hidden, few.head)
        divisor_K = divisors(spec, few.counts, few.batch.segments_BT, few.batch.tokens_BT.shape)
        total = 0.0
        for keep in (0, 1):
            only = few.counts & (jnp.arange(2) == keep)[:, None]
            given = Predictions(few.hidden, few.reads, only), few.features, few.batch, few.tables, few.head
            more = {"dtype": jnp.float64, "slots": few.everywhere, "divisor_K": divisor_K}
            total += float(objective(spec, *given, few.everywhere, **more)[0])
        assert total == pytest.approx(float(whole), rel=1e-6)
