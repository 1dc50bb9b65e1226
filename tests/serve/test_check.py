"""Tests the comparison without an engine: every difference is found, and a fault changes nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from jeagle import targets
from tests.exchange import drafts
from tests.serve import faults, float32_target
from tests.serve.check import differences, why_uninformative
from tests.serve.reference import Counted, Reference, Settings

GOLDENS = Path(__file__).parents[1] / "targets" / "goldens"
REFERENCE = Reference(
    Settings(draft_tokens=3), prompts=[[5], [6]], answers=[[1, 2, 3, 4], [5, 6]], rounds=[[2, 0], [1]], least_gap=1.0
)
RIGHT = {
    "tokens": [[1, 2, 3, 4], [5, 6]],
    "tokens_together": [[1, 2, 3, 4], [5, 6]],
    "alone": [
        {"drafts": 2, "drafted": 6, "accepted": 2, "by_position": [1, 1, 0]},
        {"drafts": 1, "drafted": 3, "accepted": 1, "by_position": [1, 0, 0]},
    ],
    "together": {"drafts": 3, "drafted": 9, "accepted": 3, "by_position": [2, 1, 0]},
}


def test_equal_answers_differ_in_nothing():
    assert differences(REFERENCE, RIGHT) == []


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        (("tokens", 0, 3), 9),
        (("tokens_together", 1, 0), 9),
        (("alone", 0, "drafts"), 3),
        (("alone", 1, "accepted"), 2),
        (("alone", 1, "by_position", 2), 1),
        (("together", "drafted"), 8),
        (("together", "by_position", 0), 3),
    ],
)
def test_one_other_number_is_found(where, wrong):
    answer = copy.deepcopy(RIGHT)
    inner = answer
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = wrong
    assert len(differences(REFERENCE, answer)) == 1


def test_an_engine_that_fails_is_a_difference():
    assert "no such layer" in differences(REFERENCE, {"failed": "no such layer"})[0]


@pytest.mark.parametrize(("rounds", "tells"), [([0] * 50, False), ([3] * 50, False), ([0, 1, 2, 3] * 5, True)])
def test_counters_that_cannot_distinguish_drafts_are_refused(rounds, tells):
    assert bool(why_uninformative(Counted.of_rounds(rounds, 3))) != tells


@pytest.mark.parametrize("layout", ["speculators", "plain"])
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_changes_one_file_and_nothing_else(fault, layout, tmp_path):
    spec = drafts.BOTH_ENGINES["llama3_rope"]  # square: 4 heads of 6, width 24
    sound = drafts.to_vllm(spec, tmp_path / "sound", layout=layout)
    out = tmp_path / "out"
    assert faults.plant(fault, sound, out)
    before, after = drafts.tensors_in(sound), drafts.tensors_in(out)
    same = set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)
    assert same != (drafts.config_in(sound) == drafts.config_in(out))


def test_a_fault_that_a_draft_cannot_have_is_not_planted(tmp_path):
    sound = drafts.to_vllm(drafts.BOTH_ENGINES["full_vocabulary"], tmp_path / "sound")
    assert not faults.plant("no d2t", sound, tmp_path / "no_d2t")
    assert not faults.plant("lost rope scaling", sound, tmp_path / "rope")


def test_a_target_is_written_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(float32_target, "SHARD_BYTES", 20_000)
    out = float32_target.write_float32(str(GOLDENS / "llama"), tmp_path / "out")
    ours, theirs = (targets.open_weights(targets.resolve(str(folder))) for folder in (GOLDENS / "llama", out))
    assert len(list(out.glob("*.safetensors"))) > 1
    assert ours.names() == theirs.names()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name).astype(np.float32), theirs.read(name))
        assert theirs.dtype(name) == np.float32
