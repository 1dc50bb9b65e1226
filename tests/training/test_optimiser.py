"""Schedules, optimisers, the moving average: their laws, and that a saved state goes on bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jeagle.config import TrainConfig
from jeagle.objective import Metrics
from jeagle.run.parameters import path_names, served_draft, served_params
from jeagle.runtime.checkpoints import Checkpoints, load_named
from jeagle.runtime.mesh import make_mesh
from jeagle.training.optimiser import OPTIMISERS, learning_rate, make_optimiser
from jeagle.training.step import Program, first_state, update

STEPS = 12


def draft() -> dict:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"fc": normal(6, 4), "layers": [{"norm": jnp.ones(4)}], "lm_head": normal(5, 4)}


def metrics(trained: float = 3.0) -> Metrics:
    return Metrics(*[jnp.full(2, trained)] * len(Metrics._fields))


def gradient(tree: dict, step: int) -> dict:
    """Towards a point, with noise of the step's own."""
    key = jax.random.key(step)
    return jax.tree.map(lambda x: x - 1.0 + 0.1 * jax.random.normal(key, x.shape), tree)


class Toy:
    """A draft of three arrays under one of the optimisers."""

    def __init__(self, **settings):
        self.config = TrainConfig(learning_rate=0.05, warmup=0.2, **settings)
        self.optimiser = make_optimiser(self.config, learning_rate(self.config, STEPS))

        self.program = Program(None, None, (), None, 2, None, average=self.config.ema)

        @jax.jit
        def step(state, gradient, loss, trained):
            return update(self.program, self.optimiser, state, (loss, metrics(trained)), gradient)

        self._step = step

    def fresh(self):
        return first_state(draft(), self.optimiser, make_mesh(devices=jax.devices()[:1]), average=self.config.ema)

    def step(self, state, loss=1.0, trained=3.0):
        return self._step(state, gradient(state.draft, int(state.step)), jnp.float32(loss), jnp.float32(trained))[0]

    def run(self, state, steps):
        for _ in range(steps):
            state = self.step(state)
        return state


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("settings", [{"optimizer": name} for name in OPTIMISERS] + [{"ema": 0.9}], ids=str)
def test_every_optimiser_learns_and_goes_on_bit_for_bit(settings, tmp_path):
    toy = Toy(**settings, weight_decay=0.01)
    start = toy.fresh()
    halfway = toy.run(start, 5)
    straight = toy.run(halfway, 5)
    distance = lambda tree: sum(float(jnp.abs(x - 1).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert distance(straight.draft) < distance(start.draft)
    for before, after in zip(jax.tree.leaves(start.draft), jax.tree.leaves(straight.draft), strict=True):
        assert after.dtype == jnp.float32 and (not np.array_equal(before, after) or np.array_equal(before, np.ones(4)))

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, halfway)
    checkpoints.wait()
    restored = checkpoints.restore(5, toy.fresh())
    checkpoints.close()
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(halfway)]
    assert same(toy.run(restored, 5), straight)


@pytest.mark.parametrize(("loss", "trained"), [(float("nan"), 3.0), (float("inf"), 3.0), (1.0, 0.0)])
def test_a_step_that_cannot_be_taken_changes_nothing_and_is_counted(loss, trained):
    toy = Toy(ema=0.5)
    before = toy.run(toy.fresh(), 2)
    after = toy.step(before, loss, trained)
    assert (int(after.step), int(after.skipped)) == (3, 1)
    assert same((after.draft, after.optimiser, after.average), (before.draft, before.optimiser, before.average))
    assert int(toy.step(after).skipped) == 1


def test_the_average_is_the_recurrence_and_is_what_is_served(tmp_path):
    toy = Toy(ema=0.3)
    state, expected = toy.fresh(), np.asarray(draft()["fc"])
    for step in range(4):
        state = toy.step(state)
        keep = min(0.3, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * np.asarray(state.draft["fc"])
    np.testing.assert_allclose(state.average["fc"], expected, rtol=1e-5)
    served = saved(state, tmp_path)
    assert same(served_draft(state.draft, state.optimiser, state.average), state.average)
    np.testing.assert_array_equal(served["fc"], state.average["fc"])
    np.testing.assert_array_equal(served["layers.0.norm"], state.average["layers"][0]["norm"])
    assert not np.array_equal(served["fc"], state.draft["fc"])


def saved(state, folder) -> dict:
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(int(state.step), state)
    checkpoints.close()
    return served_params(load_named(folder, "last")[1])


def test_what_schedule_free_serves_is_its_averaged_iterate(tmp_path):
    toy = Toy(optimizer="schedule_free")
    state = toy.run(toy.fresh(), 6)
    inner = state.optimiser.inner_states["train"].inner_state
    wanted = optax.contrib.schedule_free_eval_params(inner[1], state.draft)
    served, on_device = saved(state, tmp_path), served_draft(state.draft, state.optimiser)
    np.testing.assert_allclose(on_device["fc"], served["fc"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(served["fc"], wanted["fc"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(served["layers.0.norm"], wanted["layers"][0]["norm"], rtol=1e-5)
    assert not np.allclose(served["fc"], state.draft["fc"], atol=1e-3)


def test_plain_training_serves_what_it_trains(tmp_path):
    toy = Toy()
    state = toy.run(toy.fresh(), 2)
    served = saved(state, tmp_path)
    assert served_draft(state.draft, state.optimiser) is state.draft
    assert sorted(served) == ["fc", "layers.0.norm", "lm_head"]
    np.testing.assert_array_equal(served["fc"], state.draft["fc"])


def test_what_is_frozen_stays_and_has_no_moments():
    config = TrainConfig(learning_rate=0.1)
    optimiser = make_optimiser(config, lambda _: 0.1, trained=lambda path: path[-1] != "lm_head")
    moments = optimiser.init(draft())
    updates, _ = optimiser.update(gradient(draft(), 0), moments, draft())
    assert not np.any(updates["lm_head"]) and np.all(updates["fc"])
    assert not any(x.shape == (5, 4) for x in jax.tree.leaves(moments))
    free = TrainConfig(learning_rate=0.1, optimizer="schedule_free")
    optimiser = make_optimiser(free, lambda _: 0.1, trained=lambda path: path[-1] != "lm_head")
    served = served_draft(draft(), optimiser.init(draft()))
    np.testing.assert_array_equal(served["lm_head"], draft()["lm_head"])


def test_muon_takes_matrices_and_adamw_what_has_a_row_a_token():
    """Muon's update of a matrix is nearly orthogonal whatever the gradient's scale along each direction."""
    optimiser = make_optimiser(TrainConfig(optimizer="muon", clip=0.0), lambda _: 1.0)
    steep = {"fc": jnp.diag(jnp.array([8.0, 1.0, 2.0, 4.0])), "lm_head": jnp.diag(jnp.array([8.0, 1.0, 2.0, 4.0]))}
    updates, _ = optimiser.update(steep, optimiser.init(steep), steep)
    orthogonal = np.abs(np.diag(updates["fc"]))
    assert orthogonal.max() / orthogonal.min() < 2
    np.testing.assert_allclose(-np.diag(updates["lm_head"]), 1.0, rtol=1e-4)  # AdamW's first step: the sign


def test_schedules():
    steps, peak = 100, 1e-3

    def rates(**settings):
        rate = learning_rate(TrainConfig(learning_rate=peak, warmup=0.1, **settings), steps)
        return np.array([float(rate(step)) for step in range(steps)]) / peak

    ramp, place = (np.arange(10) + 1) / 10, np.arange(90) / 90
    laws = {
        "cosine": (1 + np.cos(np.pi * place)) / 2,
        "linear": 1 - place,
        "constant": np.ones(90),
        "wsd": np.minimum(1, (90 - np.arange(90)) / 25),
    }
    for schedule, law in laws.items():
        found = rates(schedule=schedule, decay=0.25)
        np.testing.assert_allclose(found, np.concatenate([ramp, law]), atol=1e-6, err_msg=schedule)
    np.testing.assert_array_equal(rates(optimizer="schedule_free", schedule="linear"), rates(schedule="constant"))


def test_paths_are_named_as_the_optimiser_names_them():
    assert path_names("['layers'][0]['norm'].value") == ("layers", "0", "norm")
