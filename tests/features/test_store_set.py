"""Several stores read as one, and stores that lack rows: what can be read, and that it belongs to its rows."""

from __future__ import annotations

import numpy as np
import pytest

from jeagle import features
from jeagle.errors import UserError
from tests.features import random_store

MISSING = {3, 4, 5, 12, 13, 14}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> str:
    """20 training rows without those of two segments."""
    url = str(tmp_path_factory.mktemp("partial") / "s")
    random_store.fill(url)
    features.prune_store(features.Storage(url), ["train-000001", "train-000004"])
    return url


@pytest.mark.parametrize("numbers", [range(3), [2, 9, 0, 19, 6, 11], range(3, 6), range(8), [0, 1, 14], [12, 12, 13]])
def test_a_batch_is_read_only_where_no_row_is_missing(pruned, numbers):
    stores, numbers = features.StoreSet(pruned, partial=True), np.array(numbers)
    assert stores.has_all("train", numbers) == (not MISSING & set(numbers.tolist()))
    assert stores.count_present("train") == 14 and stores.rows("train") == 20 and stores.count_present("held_out") == 5
    batch, expected = random_store.content("train", "int8")
    rows = random_store.Batch(*(array[numbers] for array in batch))
    if stores.has_all("train", numbers):
        stored = stores.stored("train", numbers, rows)
        np.testing.assert_array_equal(stored.aux.values, expected.aux.values[numbers])
        np.testing.assert_array_equal(stored.lse_BT, expected.lse_BT[numbers])
    else:
        with pytest.raises(UserError, match="lacks row"):
            stores.stored("train", numbers, rows)


def test_processes_agree_on_what_is_present(pruned):
    """One that sees a row which another does not see yet computes it, as that one does."""
    seen_elsewhere = np.ones(20, bool)
    seen_elsewhere[7] = False

    def agree(present: np.ndarray) -> np.ndarray:
        return present & seen_elsewhere if len(present) == 20 else present

    stores = features.StoreSet(pruned, partial=True, agree=agree)
    assert stores.has_all("train", np.array([6, 8])) and not stores.has_all("train", np.array([6, 7]))


def test_a_store_without_rows_is_computed_and_one_with_all_of_them_read(tmp_path):
    random_store.fill(tmp_path / "s")
    every = np.arange(20)
    assert features.StoreSet(str(tmp_path / "s"), partial=True).has_all("train", every)
    store = features.Store(str(tmp_path / "s"))
    features.prune_store(store.storage, [s.name for s in store.segments if s.split])
    empty = features.StoreSet(str(tmp_path / "s"), partial=True)
    assert not any(empty.has_all("train", every[i : i + 1]) for i in every)


def test_rows_without_their_tables_are_refused(tmp_path):
    storage = features.Storage(str(tmp_path / "s"))
    writer = features.Writer(storage, random_store.about("int8"))
    features.StoreSet(str(storage), partial=True)  # there are no rows: all will be computed
    unit = features.work_units(random_store.SPLITS, 3)[0]
    writer.commit(unit, features.ragged_rows(*random_store.content("train", "int8"), unit.rows), 8)
    with pytest.raises(UserError, match="has lost its tables"):
        features.StoreSet(str(storage), partial=True)


def test_two_stores_are_read_one_after_the_other(tmp_path):
    for name in "ab":
        random_store.fill(tmp_path / name)
    both = features.StoreSet(f"{tmp_path / 'a'},{tmp_path / 'b'}")
    assert both.rows("train") == 40
    order = np.array([31, 2, 19, 20, 39, 0])
    batch, expected = random_store.content("train", "int8")
    got = both.batch("train", order)
    np.testing.assert_array_equal(got.tokens_BT, batch.tokens_BT[order % 20])
    back = both.stored("train", order, got)
    np.testing.assert_array_equal(back.aux.values, expected.aux.values[order % 20])
    np.testing.assert_array_equal(back.lse_BT, expected.lse_BT[order % 20])


@pytest.mark.parametrize("source", ["", ",", "0.7*{a},0.3*{a}", "{a}/none"])
def test_sources_that_name_no_store_are_refused(pruned, source):
    with pytest.raises(UserError):
        features.StoreSet(source.format(a=pruned))
