"""The jitted step on a tiny target: parts, batches that teach nothing, and what moves. One draft with every switch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle import flags as configs
from jeagle.config import ObjectiveConfig, RunConfig, TrainConfig
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture
from jeagle.run import assemble
from jeagle.runtime.flops import count_flops
from jeagle.runtime.mesh import make_mesh
from jeagle.targets import Target
from jeagle.training.held_out import HeldOut
from jeagle.training.metrics import MetricsLog, checksums, summarise, unchanged
from jeagle.training.setup import StepBatch, check_parts, put_rows, set_up
from jeagle.training.step import loss_gradient, train_step
from tests import tiny

SWITCHES = {
    "draft__width": 24,
    "draft__fc_norm": True,
    "draft__qk_norm": True,
    "draft__attention_bias": True,
    "draft__sliding_window": 9,
    "draft__carry_normed": True,
    "train__learning_rate": 0.01,
    "train__steps": 100,
    "train__held_out_rows": 100,
    "data__held_out": 0.3,
    "mesh__fsdp": 1,
    "mesh__data": 1,
}


class World:
    """A run that is set up, its first batch, and the width of its slots."""

    def __init__(self, folder):
        flags = [*tiny.flags(folder, **SWITCHES), "--draft.engines"]
        config = configs.parse_overrides(RunConfig(name="x"), flags, program="x", description="x")
        self.config, (self.run, self.state) = config, set_up(config)
        self.width = self.run.widths[-1]
        self.batch = put_rows(self.run.stream.batch(0), self.run.mesh)

    def step(self, state, batch=None, frozen=None):
        """The state is copied first: the step takes it over."""
        state = jax.tree.map(jnp.copy, state)
        given = frozen or self.run.frozen, self.batch if batch is None else batch, self.width
        return train_step(self.run.program, self.run.optimiser, state, *given)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "mesh_of", lambda config: make_mesh(devices=jax.devices()[:1]))
        yield World(tmp_path_factory.mktemp("step"))


def test_a_step_in_parts_is_the_step(world):
    """Rows with unlike numbers of slots: a mean of the parts' means would be another loss."""
    program, run = world.run.program, world.run
    counts = np.asarray((world.batch.supervised_BT).sum(axis=1))
    assert len(set(counts.tolist())) > 1
    whole = jax.jit(functools.partial(loss_gradient, program, width=world.width))
    parts = jax.jit(functools.partial(loss_gradient, program._replace(parts=4), width=world.width))
    (loss, metrics), gradient = whole(world.state.draft, run.frozen, world.batch)
    (ours, ours_figures), ours_gradient = parts(world.state.draft, run.frozen, world.batch)
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    for name, found, wanted in zip(metrics._fields, ours_figures, metrics, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    for found, wanted in zip(jax.tree.leaves(ours_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6 * float(jnp.abs(wanted).max()) + 1e-9)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_batch_that_teaches_nothing_or_a_nan_is_skipped_counted_and_reported(world):
    state = world.state
    silent = world.batch._replace(supervised_BT=jnp.zeros_like(world.batch.supervised_BT))
    broken = world.run.frozen._replace(
        tables=world.run.frozen.tables._replace(head_DH=world.run.frozen.tables.head_DH * jnp.nan)
    )
    for skipped, (batch, frozen) in enumerate([(silent, None), (None, broken)], 1):
        after, report = world.step(state, batch, frozen)
        metrics = summarise(report)
        assert metrics["taken"] == 0 and metrics["skipped"] == skipped == int(after.skipped)
        assert same((after.draft, after.optimiser), (state.draft, state.optimiser))
        state = after
    after, report = world.step(state)
    assert bool(report.taken) and int(after.skipped) == 2 and not same(after.draft, state.draft)
    assert summarise(report)["trained"] > 0


BROKEN = {"blocks.4.mlp.up_proj.kernel": "its layer 4", "norm": "its final norm", "lm_head": "its lm_head"}


def broken_targets(world):
    """(how a message names it, the frozen arrays with a number that is not finite there)."""
    leaves = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(world.run.frozen.target)}
    absent = next(i for i in range(300) if i not in np.asarray(world.run.frozen.tables.draft_to_target_D))
    for name, part in BROKEN.items():
        flat = dict(nnx.to_flat_state(world.run.frozen.target))
        leaf = flat[leaves[name]]
        # Of lm_head a single logit, of a token that the draft vocabulary lacks.
        place, value = ((absent,), np.nan) if name == "lm_head" else ((..., 3), np.inf)
        flat[leaves[name]] = leaf.replace(leaf.get_value().at[place].set(value))
        yield part, world.run.frozen._replace(target=nnx.from_flat_state(list(flat.items())))


def test_a_broken_target_stops_training_evaluation_and_extraction_and_nothing_is_accepted(world):
    """No metric is better than the worst. The first layer above those that the draft reads is such a case."""
    steps = range(world.config.draft.ttt_steps)
    worst = dict.fromkeys([f"{name}_{k}" for name in ("accuracy", "acceptance") for k in steps] + ["taken"], 0.0)
    worst |= {"expected_acceptance_length": 1.0, "expected_acceptance_length_sampled": 1.0}
    for part, frozen in broken_targets(world):
        run = world.run._replace(frozen=frozen)
        metrics = summarise(report := world.step(world.state, frozen=frozen)[1])
        assert {name: metrics[name] for name in worst} == worst, part
        stops = functools.partial(pytest.raises, UserError, match=f"The target cannot be used: {part}")
        log = MetricsLog(world.config, 0, 4, check_target=run.check_target)
        log.step(StepBatch(0, world.batch, None, world.width, 1), report)
        with log, stops():
            log.drain()
        with HeldOut(run, 0, {}) as evaluation, stops():
            evaluation(2, world.state)
        if part != "its lm_head":  # what is stored are the states below it
            target = Target(None, world.run.program.target, frozen.target)
            with stops():
                Capture(target._replace(spec=SimpleNamespace(width=tiny.WIDTH)), (2, 4), run.mesh, width=64)(
                    world.batch
                )


def test_a_draft_that_is_not_finite_has_the_worst_score(world):
    scores: dict[int, float] = {}
    with HeldOut(world.run, 0, scores) as evaluation:
        evaluation(2, world.state._replace(draft=jax.tree.map(lambda x: x * jnp.nan, world.state.draft)))
    assert scores == {2: 1.0}


def test_every_trained_tensor_moves_within_100_steps_and_stays_float32(world):
    state, before = world.state, checksums(world.state.draft)
    losses = []
    for step in range(100):
        batch = put_rows(world.run.stream.batch(step), world.run.mesh)
        state, report = world.step(state, batch)
        losses.append(float(report.loss))
    assert unchanged(before, checksums(state.draft)) == []
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.draft))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    metrics = summarise(report)
    assert 1 < metrics["expected_acceptance_length_sampled"] < 4 and metrics["taken"] == 1


def test_flops_of_a_step_are_counted_from_its_trace_and_double_with_its_rows(world):
    """What the progress line divides by the chips' peak; at least what the target's kernels alone take."""
    run = world.run

    def flops(batch):
        return count_flops(
            train_step.trace(run.program, run.optimiser, world.state, run.frozen, batch, world.width).jaxpr
        )

    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), world.batch)
    kernels = tiny.LAYERS * tiny.WIDTH * (2 * (tiny.HEADS + tiny.KV_HEADS) * tiny.HEAD_DIM + 3 * tiny.INNER)
    least = 2 * kernels * world.batch.tokens_BT.size
    assert least < flops(world.batch) < 20 * least
    assert flops(twice) == pytest.approx(2 * flops(world.batch), rel=0.01)  # chunks of positions are rounded up


def held_out_figures(world, rows: int, **switches) -> dict[str, float]:
    """What a run logs of its held-out rows, so many of which are evaluated at a time."""
    train = dataclasses.replace(world.config.train, batch_rows=rows)
    config = dataclasses.replace(world.config, train=train, name=f"{rows}_at_a_time")
    config.folder.mkdir()
    (config.folder / "data").symlink_to(world.config.folder / "data")
    program = world.run.program._replace(objective=dataclasses.replace(world.run.program.objective, **switches))
    with HeldOut(world.run._replace(config=config, program=program), 0, {}) as held_out:
        held_out(1, world.state)
    [line] = (config.folder / "held_out" / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def test_held_out_figures_do_not_depend_on_how_many_rows_are_evaluated_at_a_time(world):
    """Batches of unlike numbers of slots, the last one filled up; whatever the dialect divides its loss by."""
    switches = {"normaliser": "document", "mask_out_of_vocab": True}
    by_two, by_five = (held_out_figures(world, rows, **switches) for rows in (2, 5))
    assert by_two["loss_0"] > 0 and len(by_two) > 8
    for name, figure in by_two.items():
        assert by_five[name] == pytest.approx(figure, rel=1e-5), name


def test_one_changed_bit_is_seen():
    tree = {"a": jnp.ones(5), "b": [jnp.zeros(3)]}
    nudged = {"a": jnp.ones(5).at[2].set(np.nextafter(np.float32(1), np.float32(2))), "b": [jnp.zeros(3)]}
    assert unchanged(checksums(tree), checksums(nudged)) == ["['b'][0]"]


@pytest.mark.parametrize(
    ("dialect", "switches", "devices", "message"),
    [
        ("jeagle", {}, 4, ""),
        ("jeagle", {"loss": "lk_step"}, 4, "--train.accumulate 2 would change"),
        ("jeagle", {"mask_out_of_vocab": True}, 4, "--train.accumulate 2 would change"),
        ("specforge", {}, 4, ""),
        ("jeagle", {}, 8, "multiple of 16"),
    ],
)
def test_parts_that_would_change_the_loss_are_refused(dialect, switches, devices, message):
    objective = ObjectiveConfig(dialect=dialect, **switches)
    config = RunConfig(name="x", objective=objective, train=TrainConfig(accumulate=2))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_parts(config, make_mesh(devices=jax.devices()[:devices]))
