"""A store with some of the rows: who computes which row of a batch, whatever is there and however rows lie."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jeagle import features
from jeagle.errors import UserError
from jeagle.features.partial import deal, widths
from tests.features import made


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_each_shard_begins_with_its_share_of_what_is_missing(shards, per_shard, data):
    there = np.array(data.draw(st.lists(st.booleans(), min_size=shards * per_shard, max_size=shards * per_shard)))
    order = deal(there, shards)
    assert sorted(order) == list(range(len(there)))
    lacking = (~there[order]).reshape(shards, per_shard)
    assert (np.diff(lacking.astype(int), axis=1) <= 0).all()  # first the missing ones, then the others
    assert np.ptp(lacking.sum(axis=1)) <= 1


@given(st.integers(1, 12), st.integers(1, 4))
def test_widths_are_few_and_suffice(each, parts):
    found = widths(each * parts, parts)
    assert found[0] == 0 and found[-1] == each * parts and len(found) <= 5
    assert all(width % parts == 0 for width in found)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> str:
    """20 training rows without those of two segments."""
    url = str(tmp_path_factory.mktemp("partial") / "s")
    made.fill(url)
    features.prune(features.Place(url), ["train-000001", "train-000004"])
    return url


def test_a_whole_store_is_read_as_it_is_and_an_empty_one_not_at_all(tmp_path):
    made.fill(tmp_path / "s")
    batch, _ = made.content("train", "int8")
    numbers, layout = np.arange(8)[::-1], features.Layout(shards=2)
    rows = made.Batch(*(array[numbers] for array in batch))
    store = features.Store(str(tmp_path / "s"))
    given = "train", numbers, rows, numbers
    for a, b in zip(
        *map(jax.tree.leaves, (features.Partial(store, layout).dealt(*given), features.Mixture([store]).dealt(*given))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    features.prune(store.place, [s.name for s in store.segments if s.split])
    dealt = features.Partial(features.Store(str(tmp_path / "s")), layout).dealt(*given)
    assert dealt.order.tolist() == list(range(8)) and dealt.stored is None


MISSING = {3, 4, 5, 12, 13, 14}


@pytest.mark.parametrize("numbers", [range(8), range(3, 11), [0, 1, 2, 6, 7, 8, 9, 10], [3, 4, 5, 12, 13, 14, 3, 4]])
@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_what_is_read_belongs_to_the_rows_it_stands_beside(pruned, numbers, shards, parts):
    layout = features.Layout(shards=shards, parts={"train": parts})
    store, numbers = features.Partial(features.Store(pruned), layout), np.array(numbers)
    batch, found = made.content("train", "int8")
    rows = made.Batch(*(array[numbers] for array in batch))
    order, stored = store.dealt("train", numbers, rows, numbers)
    assert sorted(order) == list(range(8))
    count = 0 if stored is None else len(stored.greedy_BT)
    computed = numbers[order].reshape(shards, -1)[:, : 8 // shards - count // shards]
    read = numbers[order].reshape(shards, -1)[:, 8 // shards - count // shards :].reshape(-1)
    assert not MISSING & set(read.tolist())
    assert computed.shape[1] in widths(8 // shards, parts)
    if stored is not None:
        np.testing.assert_array_equal(stored.aux.values, found.aux.values[read])
        np.testing.assert_array_equal(stored.lse_BT, found.lse_BT[read])
    lacking = sum(number in MISSING for number in numbers.tolist())
    assert (lacking == 0) == (count == 8)
    assert lacking < 8 or stored is None


def test_processes_compute_equally_many(pruned):
    """One that has every row computes as many as one that lacks some: they run one program."""
    everyone = np.array([0, 1, 2, 6, 3, 4, 7, 8])
    whole, lacks = everyone[:4], everyone[4:]
    batch, _ = made.content("train", "int8")
    store = features.Partial(features.Store(pruned), features.Layout(processes=2, shards=2))
    for own in (whole, lacks):
        dealt = store.dealt("train", own, made.Batch(*(array[own] for array in batch)), everyone)
        assert len(dealt.stored.greedy_BT) == 2
    assert not MISSING & {*own[dealt.order].reshape(2, 2)[:, 1].tolist()}


def test_rows_without_their_tables_are_refused(tmp_path):
    place = features.Place(str(tmp_path / "s"))
    writer = features.Writer(place, made.about("int8"))
    features.Partial(features.Store(str(place)))  # nothing is there: all will be computed
    unit = features.units_of(made.SPLITS, 3)[0]
    writer.commit(unit, features.ragged(*made.content("train", "int8"), unit.rows), 8)
    with pytest.raises(UserError, match="has lost its tables"):
        features.Partial(features.Store(str(place)))
