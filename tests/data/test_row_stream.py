"""Rows come in an order that depends on the seed and the epoch alone, and the widths of batches are correct."""

from __future__ import annotations

import numpy as np
import pytest

from jeagle import align
from jeagle.data import Rendered, RowStream
from jeagle.errors import UserError
from tests.data.helpers import pack, save_rows


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    documents = [Rendered(np.full(9, i + 1, np.int32), rng.random(9) < 0.6) for i in range(23)]
    save_rows(pack(documents, 10).rows, tmp_path / "rows")
    return tmp_path / "rows"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes_or_on_the_first_step(rows, processes):
    alone = RowStream(rows, 4, seed=5)
    parts = [RowStream(rows, 4, seed=5, process_index=i, process_count=processes) for i in range(processes)]
    for step in range(14):  # over epoch ends
        wanted = alone.batch(step).tokens_BT
        np.testing.assert_array_equal(np.concatenate([p.batch(step).tokens_BT for p in parts]), wanted)
    for part in parts:
        part.count_live(3, "served", cross_documents=False)
    assert [parts[0].widest(step) for step in range(3, 9)] == [parts[-1].widest(step) for step in range(3, 9)]


def test_the_order_follows_from_the_seed_and_the_epoch_alone(rows):
    """One order, cut into batches of any size; another for each seed and each epoch."""
    one = RowStream(rows, 1, seed=5)
    flat = np.concatenate([one.row_numbers(step) for step in range(2 * 23)])
    for size in (2, 4, 23):
        stream = RowStream(rows, size, seed=5)
        cut = np.concatenate([stream.row_numbers(step) for step in range(2 * 23 // size)])
        np.testing.assert_array_equal(cut, flat[: len(cut)])
    other = RowStream(rows, 1, seed=6)
    assert [int(other.row_numbers(step)[0]) for step in range(23)] != flat[:23].tolist() != flat[23:].tolist()


def test_every_epoch_holds_every_row_in_another_order(rows):
    stream = RowStream(rows, 1, seed=5)
    epochs = [[int(stream.row_numbers(e * 23 + i)[0]) for i in range(23)] for e in range(3)]
    assert all(sorted(e) == list(range(23)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_widest_is_the_largest_number_of_live_slots_or_teacher_positions(rows):
    stream = RowStream(rows, 4, seed=1)
    stream.count_live(3, "predicted", cross_documents=False)
    for step in range(5):
        batch = stream.batch(step)
        counts = align.counting_slots(batch, 3, "predicted", xp=np)
        reads = align.read_positions(batch.segments_BT, 3, xp=np)
        taught = align.teacher_positions(counts, reads, xp=np).sum(1)
        assert stream.widest(step) == max(counts.any(0).sum(1).max(), taught.max())


def test_batch_rows_must_be_a_multiple_of_the_processes(rows):
    with pytest.raises(UserError, match="is not a multiple"):
        RowStream(rows, 3, seed=0, process_count=2)
