"""The draft vocabulary is the most frequent tokens, and each known fault of its maps is recognised."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jeagle.data import (
    Rendered,
    choose_vocabulary,
    count_supervised,
    coverage,
    load_given_vocabulary,
    load_tables,
    save_tables,
)
from jeagle.errors import UserError
from jeagle.run import dataset
from tests import tiny
from tests.data.helpers import pack
from tests.data.test_preparation import prepare


def test_the_vocabulary_is_the_most_frequent_tokens_and_the_end_tokens():
    counts = np.array([5, 0, 9, 9, 1, 7])
    np.testing.assert_array_equal(choose_vocabulary(counts, 3, [1]), [1, 2, 3])  # ties go to the lower id
    np.testing.assert_array_equal(choose_vocabulary(counts, 0, [1]), np.arange(6))
    assert coverage(counts, np.array([2, 3])) == pytest.approx(18 / 31)
    with pytest.raises(UserError, match="too small for the 2 end tokens"):
        choose_vocabulary(counts, 1, [1, 4])


def test_tables_are_offsets_and_are_checked(tmp_path):
    ids = np.array([1, 2, 5])
    save_tables(tmp_path / "t", np.ones(8, np.int64), ids, {"data": "x"})
    np.testing.assert_array_equal(np.load(tmp_path / "t" / "d2t.npy"), [1, 1, 3])
    np.testing.assert_array_equal(load_tables(tmp_path / "t", {"data": "x"}), ids)
    with pytest.raises(UserError, match="data differ"):
        load_tables(tmp_path / "t", {"data": "y"})
    np.save(tmp_path / "t" / "d2t.npy", ids)  # ids where offsets belong
    with pytest.raises(UserError, match="offsets"):
        load_tables(tmp_path / "t")


def test_a_tokenizer_of_another_target_is_refused():
    rows = pack([Rendered(np.array([3, 9], np.int32), np.array([False, True]))], 4).rows
    assert count_supervised(rows, 10)[9] == 1
    with pytest.raises(UserError, match="id 9.*vocabulary has 9"):
        count_supervised(rows, 9)
    with pytest.raises(UserError, match="end token 12"):
        choose_vocabulary(np.arange(10), 4, [12])


def test_tables_that_were_cut_off_are_a_user_error(tmp_path):
    save_tables(tmp_path / "t", np.ones(8, np.int64), np.array([1, 2, 5]), {})
    (tmp_path / "t" / "d2t.npy").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_tables(tmp_path / "t")


# T14: a map is built anew under a trained head, or a stale one is found.
def test_the_vocabulary_of_a_trained_draft_does_not_change(tmp_path):
    flags = tiny.flags(tmp_path)
    before = load_tables(prepare(flags).tables)
    run = tmp_path / "runs" / "tiny"
    (run / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints and no draft\.json"):
        prepare([*flags, "--draft.vocab", "50"])
    tables = json.loads((run / "tables" / "manifest.json").read_text())
    (run / "draft.json").write_text(json.dumps({"draft": {}, "made_from": {"tables": tables}}))
    with pytest.raises(UserError, match="begun with other inputs.*draft_vocab was 100 and is 50"):
        prepare([*flags, "--draft.vocab", "50"])
    np.testing.assert_array_equal(load_tables(tmp_path / "runs" / "tiny" / "tables"), before)


def test_a_map_that_was_made_from_other_data_is_refused(tmp_path):
    save_tables(tmp_path / "t", np.ones(8, np.int64), np.array([1, 2, 5]), {"data": "x", "draft_vocab": 3})
    with pytest.raises(UserError, match="made from other data .data differ"):
        load_tables(tmp_path / "t", {"data": "y", "draft_vocab": 3})


def test_a_map_that_replaced_another_is_refused(tmp_path):
    """By its path alone it would be taken: the manifest beside it is the old one."""
    for name, ids in (("mine", [1, 2, 5]), ("other", [1, 3, 6])):
        save_tables(tmp_path / name, np.ones(8, np.int64), np.array(ids), {"data": "x"})
    stale = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "mine" / name)
    with pytest.raises(UserError, match="not the one that its manifest names"):
        load_tables(tmp_path / "mine")
    with pytest.raises(UserError, match="made from other data .ids differ"):  # what a trained draft remembers
        load_tables(tmp_path / "other", stale)


def test_a_given_vocabulary_is_used_unchanged(tmp_path):
    flags = tiny.flags(tmp_path)
    ids = np.array([0, 1, *range(100, 198)])
    save_tables(tmp_path / "given", np.ones(319, np.int64), ids, {})
    vocab = json.loads((tmp_path / "target" / "config.json").read_text())["vocab_size"]
    mask = np.zeros(vocab, bool)
    mask[ids] = True
    np.save(tmp_path / "given" / "t2d.npy", mask)
    made = prepare([*flags, "--data.vocabulary", str(tmp_path / "given")])
    np.testing.assert_array_equal(load_tables(made.tables), ids)
    assert prepare([*flags, "--data.vocabulary", str(tmp_path / "given")]).reused
    with pytest.raises(UserError, match="has 100 tokens, but --draft.vocab is 90: make it 100"):
        prepare([*flags, "--draft.vocab", "90", "--data.vocabulary", str(tmp_path / "given")])


# T15, T16: absolute ids, zeros, a missing map.
@pytest.mark.parametrize(
    ("offsets", "mask", "message"),
    [
        ([1, 2, 5], [1, 2, 5], "holds offsets"),  # absolute ids
        ([1, 1, 3], [1, 2, 6], "contradict"),
        ([0, 0, 0], None, "all zeros"),
        ([3, 1, 0], None, "does not rise"),
        ([-2, 0, 0], None, "does not rise"),
        ([1.0, 1.0, 3.0], [1, 2, 5], "integers"),
        ([1, 1, 7], [1, 2, 9], "contains token 9, but the target has 8"),
    ],
)
def test_maps_that_name_other_tokens_are_refused(tmp_path, offsets, mask, message):
    np.save(tmp_path / "d2t.npy", np.array(offsets))
    if mask is not None:
        marked = np.zeros(max(8, max(mask) + 1), bool)
        marked[mask] = True
        np.save(tmp_path / "t2d.npy", marked)
    with pytest.raises(UserError, match=message):
        load_given_vocabulary(tmp_path, 3, 8, [])


def test_a_given_vocabulary_is_read_from_every_supported_place(tmp_path):
    from safetensors.numpy import save_file

    ids, vocab = np.array([1, 2, 5]), 8
    offsets, mask = ids - np.arange(3), np.isin(np.arange(vocab), ids)
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own" / "d2t-3.npy", offsets)
    np.save(tmp_path / "own" / "t2d-3.npy", mask)
    (tmp_path / "draft").mkdir()
    save_file({"d2t": offsets, "t2d": mask}, tmp_path / "draft" / "model.safetensors")
    save_tables(tmp_path / "run" / "tables", np.ones(vocab, np.int64), ids, {})
    for place in ("own", "own/d2t-3.npy", "draft", "run"):
        np.testing.assert_array_equal(load_given_vocabulary(tmp_path / place, 3, vocab, [2]), ids)
    with pytest.raises(UserError, match="none of the end tokens 3"):
        load_given_vocabulary(tmp_path / "own", 3, vocab, [3])
    with pytest.raises(UserError, match="does not exist"):
        load_given_vocabulary(tmp_path / "none", 3, vocab, [])


# T17: the draft cannot say the end, or has more slots than the data has tokens.
def test_every_end_token_is_in_the_vocabulary_and_free_places_are_filled():
    counts = np.zeros(50, np.int64)
    counts[[7, 9]] = 5
    ids = choose_vocabulary(counts, 10, [48, 49])
    assert {7, 9, 48, 49} <= set(ids.tolist()) and len(ids) == 10 and (np.diff(ids) > 0).all()


def test_low_coverage_gives_a_warning_with_numbers(tmp_path):
    lines = dataset.describe(prepare([*tiny.flags(tmp_path), "--draft.vocab", "5"]))
    [warning] = [line for line in lines if "vocabulary lacks" in line]
    assert warning.startswith("warning: ") and "raise --draft.vocab from 5" in warning and " tokens): " in warning
