"""Which checkpoints of a run are kept, and which of them a step means."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import pytest

from jeagle.errors import UserError
from jeagle.runtime.checkpoints import Checkpoints, best_step, chosen_step
from jeagle.runtime.trackers import scores


def test_the_best_stays_however_old_it_is(tmp_path):
    """Scores come after their checkpoint, as evaluations do."""
    measured: dict[int, float] = {}
    checkpoints = Checkpoints(tmp_path, keep=1, scores=measured)
    there = []
    for step, score in enumerate([1.2, 1.9, 1.4, 1.9, 1.1, 1.3], 1):
        checkpoints.save(step, {"weight": jnp.zeros(2)})
        measured[step] = score
        checkpoints.wait()
        there.append(checkpoints.steps())
    checkpoints.close()
    assert there == [[1], [1, 2], [2, 3], [2, 4], [4, 5], [4, 6]]


def test_without_scores_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"weight": jnp.zeros(2)})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_of_equals_the_later_is_best_and_what_is_no_number_is_not():
    assert best_step([1, 2, 3], {1: 2.0, 2: 2.0, 3: 1.0, 4: 9.0}) == 2
    assert best_step([1, 2], {1: -math.inf, 2: math.nan}) is None
    assert best_step([5], {}) is None


def test_steps_are_named_by_number_last_or_best():
    measured = {10: 1.5, 20: 1.8, 30: 1.6}
    assert chosen_step([30, 10], "best", where="runs/a", scores=measured) == 30  # 20 is gone
    assert chosen_step([10, 20, 30], "best", where="runs/a", scores=measured) == 20
    assert chosen_step([10, 20, 30], "last", where="runs/a", scores=measured) == 30
    assert chosen_step([10, 20, 30], "10", where="runs/a") == 10
    with pytest.raises(UserError, match=r"held-out figures.*--step last, or one of 40, 50"):
        chosen_step([50, 40], "best", where="runs/a", scores=measured)


def test_scores_are_read_from_what_was_logged(tmp_path):
    lines = [json.dumps(row) for row in ({"step": 2, "length": 1.5}, {"step": 4, "length": None})]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "len']))
    assert scores(tmp_path, "length") == {2: 1.5, 4: -math.inf}
    assert scores(tmp_path / "none", "length") == {}


def test_lines_that_a_run_never_wrote_are_no_scores(tmp_path):
    rows = [{"step": "2", "length": 1.0}, {"step": None}, {"step": 4, "length": "1.5"}, {"step": 6, "length": [1]}, [8]]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert best_step([2, 4, 6, 8], scores(tmp_path, "length")) is None
