"""What a run says of itself."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.config import RunConfig, TrainConfig
from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.objective import Metrics
from jeagle.run.parameters import Trained
from jeagle.training import metrics as logs
from jeagle.training.metrics import MOST_SKIPPED, MetricsLog, Speed, UnchangedParameters
from jeagle.training.setup import StepBatch
from jeagle.training.step import StepReport


def report(*, taken=True, trained=6.0, skipped=0, loss=2.0):
    """Of two TTT steps: 8 and 4 slots count, 4 and 1 are right."""
    two = lambda a, b: np.array([a, b], np.float32)  # noqa: E731
    metrics = Metrics(
        loss=two(loss, 3.0),
        counting=two(8, 4),
        correct=two(4, 1),
        trained=two(trained, trained),
        accepted=two(3, 3),
        prefix_counting=two(8, 4),
        prefix_correct=two(4, 1),
        prefix_accepted=two(4, 1),
    )
    return StepReport(np.float32(loss), metrics, np.float32(1.0), np.bool_(taken), np.int32(skipped))


ROWS = Batch(*[np.ones((1, 5), np.int32)] * 4)


def batch(step):
    return StepBatch(step, ROWS, None, width=5, tokens=5)


def config_in(folder) -> RunConfig:
    return RunConfig(name=folder.name, runs=str(folder.parent), train=TrainConfig(log_every=1))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_expected_lengths_and_skips_are_logged(tmp_path):
    log = MetricsLog(config_in(tmp_path), 0, 10)
    with log:
        log.step(batch(0), report())
        log.step(batch(1), report(taken=False, skipped=1, loss=float("nan")))
        log.drain()
    first, second = lines(tmp_path)
    assert first["expected_acceptance_length"] == pytest.approx(1 + 0.5 + 0.5 * 0.25)
    assert first["expected_acceptance_length_sampled"] == pytest.approx(1 + 4 / 8 + 1 / 4)
    assert (first["taken"], first["skipped"], second["taken"], second["skipped"]) == (1, 0, 0, 1)
    assert second["loss"] is None


@pytest.mark.parametrize(("trained", "why"), [(0.0, "no slot of its rows counts"), (6.0, "gradient norm")])
def test_a_skipped_update_is_said_and_too_many_end_the_run(tmp_path, capsys, trained, why):
    log = MetricsLog(config_in(tmp_path), 0, 100, rows_of=lambda step: [step, 8])

    def steps(first, count, **how):
        for step in range(first, first + count):
            log.step(batch(step), report(skipped=step, **how))
        log.drain()

    with log:
        steps(0, MOST_SKIPPED - 1, taken=False, trained=trained)
        steps(MOST_SKIPPED, 1)
        steps(MOST_SKIPPED + 1, MOST_SKIPPED - 1, taken=False, trained=trained)
        with pytest.raises(UserError, match=f"{MOST_SKIPPED} updates in a row.*{why}"):
            steps(2 * MOST_SKIPPED, 1, taken=False, trained=trained)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("step 2: update skipped (")]
    assert why in line and "rows 1, 8" in line


def test_the_flops_share_is_of_the_last_reports_and_the_known_peak(tmp_path, monkeypatch):
    speed = Speed(reports=3)
    assert [speed.of(flops, now) for flops, now in [(9, 0), (4, 2), (4, 4), (16, 5)]] == [0.0, 2.0, 2.0, 20 / 3]
    monkeypatch.setattr(logs, "all_devices_flops", lambda: 1e3)
    monkeypatch.setattr(logs.time, "monotonic", iter(np.arange(0.0, 100.0, 0.5)).__next__)
    log = MetricsLog(config_in(tmp_path), 0, 10)
    with log:
        for step in range(3):
            log.step(batch(step), report(), flops=50.0)
        log.drain()
    assert lines(tmp_path)[0]["flops_share"] == 0 and lines(tmp_path)[2]["flops_share"] > 0
    monkeypatch.setattr(logs, "all_devices_flops", lambda: None)
    other = tmp_path / "cpu"
    other.mkdir()
    log = MetricsLog(config_in(other), 0, 10)
    with log:
        log.step(batch(0), report(), flops=50.0)
        log.drain()
    assert "flops_share" not in lines(other)[0]


def test_parameters_that_do_not_change_are_named_once():
    draft = {"fc": jnp.ones(3), "layers": [{"norm": jnp.ones(2)}], "lm_head": jnp.ones(4)}
    changed = draft | {"fc": jnp.zeros(3)}
    watch = UnchangedParameters(draft, Trained(head=False), 40)
    assert watch.after(138, changed) == watch.after(140, changed) == ""
    assert watch.after(139, changed) == "warning: not changed in 100 steps: ['layers'][0]['norm']"
    assert "['lm_head']" in UnchangedParameters(draft, Trained(), 0).after(99, changed)
    everything = {"fc": jnp.zeros(3), "layers": [{"norm": jnp.zeros(2)}], "lm_head": jnp.zeros(4)}
    assert UnchangedParameters(draft, Trained(), 0).after(99, everything) == ""
