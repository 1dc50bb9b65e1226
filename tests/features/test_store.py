"""What is written comes back; several writers share the work; damage is found; what does not fit is refused."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jeagle import align, features
from jeagle.errors import UserError
from jeagle.features.manifests import sealed
from jeagle.runtime.ahead import read_ahead
from tests.features import made


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished int8 store. Tests that change it take a copy."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    assert made.fill(path) == 9
    return path


@pytest.mark.parametrize("form", made.FORMS)
def test_rows_come_back_as_they_were(tmp_path, form):
    made.fill(tmp_path / "s", form)
    made.check_whole(tmp_path / "s", form)
    assert features.Store(str(tmp_path / "s")).form == made.FORMS[form]


def test_padding_and_unneeded_states_cost_nothing(whole):
    store = features.Store(str(whole))
    batch, _ = made.content("train", "int8")
    segments = [s for s in store.segments if s.split == "train"]
    assert sum(s.arrays["taps"]["shape"][0] for s in segments) == (batch.segments_BT > 0).sum()
    assert 0 < sum(s.arrays["last"]["shape"][0] for s in segments) < (batch.segments_BT > 0).sum()


def test_taps_that_nothing_sees_cost_nothing(tmp_path):
    made.fill(tmp_path / "s", "seen")
    store, (batch, _) = features.Store(str(tmp_path / "s")), made.content("train", "seen")
    segments = [s for s in store.segments if s.split == "train"]
    kept = sum(s.arrays["taps"]["shape"][0] for s in segments)
    assert kept == align.seen_positions(batch, xp=np).sum() == sum(sum(s.taps) for s in segments)
    assert 0 < kept < 0.8 * (batch.segments_BT > 0).sum()


def test_a_store_from_before_there_was_a_choice_is_read(tmp_path):
    """Its store.json names two types, and its segments count no taps."""
    made.fill(tmp_path / "s")
    path = tmp_path / "s" / "store.json"
    tree = json.loads(path.read_text())
    tree["made_from"]["arrays"] = {"taps": "int8", "last": "int8"}
    path.write_bytes(sealed({k: v for k, v in tree.items() if k != "checksum"}))
    for path in (tmp_path / "s" / "manifests").iterdir():
        tree = json.loads(path.read_text())
        path.write_bytes(sealed({k: v for k, v in tree.items() if k not in ("checksum", "seen")}))
    (tmp_path / "s" / "index.json").unlink()
    made.check_whole(tmp_path / "s")
    assert made.fill(tmp_path / "s") == 0  # it is the same store


def test_writers_at_once_share_the_work(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: made.fill(tmp_path / "s", pause=0.01), range(4)))
    assert sum(counts) == 9
    made.check_whole(tmp_path / "s")


def test_two_that_make_the_same_segment_leave_one(tmp_path):
    place = features.Place(str(tmp_path / "s"))
    writers = [features.Writer(place, made.about("int8")) for _ in range(2)]
    unit = features.units_of(made.SPLITS, 3)[1]
    found = features.ragged(*made.content("train", "int8"), unit.rows)
    assert [w.commit(unit, found, 8) for w in writers] == [True, False]
    assert len(place.names("segments")) == 1


def test_what_a_dead_writer_left_is_made_again(tmp_path):
    place = features.Place(str(tmp_path / "s"))
    dead = features.Writer(place, made.about("int8"))
    unit = features.units_of(made.SPLITS, 3)[0]
    assert dead.take_one(unit)
    path = tmp_path / "s" / "claims" / f"{unit.name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"writer": "another", "started": "before"}))
    (tmp_path / "s" / "segments" / f"{unit.name}.gone" / "taps").mkdir(parents=True)
    assert made.fill(tmp_path / "s") == 9
    made.check_whole(tmp_path / "s")


def test_an_unfinished_store_is_not_trained_from(tmp_path):
    place = features.Place(str(tmp_path / "s"))
    writer = features.Writer(place, made.about("int8"))
    unit = features.units_of(made.SPLITS, 3)[0]
    writer.commit(unit, features.ragged(*made.content("train", "int8"), unit.rows), 8)
    with pytest.raises(UserError, match="22 of 25 rows are missing, and its tables"):
        features.open_stores(str(tmp_path / "s"))
    made.fill(tmp_path / "s")
    made.check_whole(tmp_path / "s")


def test_another_store_is_not_written_over(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    with pytest.raises(UserError, match=r"arrays.last, arrays.taps, taps differ .*int8.*fp8"):
        made.fill(tmp_path / "s", "fp8", taps=[1, 2, 4])
    with pytest.raises(UserError, match=r"arrays.taps_at differs"):
        made.fill(tmp_path / "s", "seen")
    with pytest.raises(UserError, match=r"arrays.taps, arrays.teacher, arrays.top_k differ"):
        made.fill(tmp_path / "s", "top_k")
    made.check_whole(tmp_path / "s")


def faults(folder: Path) -> list:
    """What verify finds, or why the store does not even open."""
    try:
        return list(features.verify(features.Store(str(folder))))
    except UserError as error:
        return [error]


def test_any_flipped_byte_is_found(whole, tmp_path):
    """One random bit in every file of a segment, of the tables, and of what is said of them."""
    copy, rng = tmp_path / "s", random.Random(1)
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("index.json", "train-*[1-9].*", "held_out-000001*"))
    files = [p for p in copy.rglob("*") if p.is_file()]
    assert len(files) > 40
    for path in sorted(files):
        data = bytearray(path.read_bytes())
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert len(faults(copy)) == 1, path
        path.write_bytes(data)
    assert list(features.verify(features.Store(str(copy)))) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_stops_a_reader(whole, tmp_path, harm):
    shutil.copytree(whole, tmp_path / "s")
    path = next((tmp_path / "s" / "segments").glob("train-000002.*")) / "taps" / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes({"flip": data, "cut": data[:-7], "remove": b""}[harm])
    if harm == "remove":
        path.unlink()
    store = features.Store(str(tmp_path / "s"))
    with pytest.raises(UserError, match="damaged: taps of segment train-000002"):
        store.stored("train", range(20), store.batch("train", range(20)))


def test_damaged_segments_are_pruned_and_made_again(whole, tmp_path):
    copy = tmp_path / "s"
    shutil.copytree(whole, copy)
    for pattern in ("train-000002.*/last/c/0/0", "held_out-000001.*/tokens/c/0", "tables.*/embed/zarr.json"):
        path = next((copy / "segments").glob(pattern))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (copy / "segments" / "train-000003.leftover").mkdir()
    damaged = [d.segment for d in features.verify(features.Store(str(copy)))]
    assert damaged == ["held_out-000001", "tables", "train-000002"]
    gone = features.prune(features.Place(str(copy)), damaged)
    assert "segments/train-000003.leftover" in gone
    assert features.Store(str(copy)).missing() == 2 + 3
    assert made.fill(copy) == 2
    made.check_whole(copy)


def test_a_lost_or_stale_index_is_made_anew(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    (tmp_path / "s" / "index.json").unlink()
    made.check_whole(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text("{")
    made.check_whole(tmp_path / "s")


def test_stores_are_mixed_row_by_row(whole, tmp_path):
    made.fill(tmp_path / "b", "int8")
    both = features.open_stores(f"0.7*{whole},0.3*{tmp_path / 'b'}")
    assert both.weights == [0.7, 0.3] and both.rows("train") == 40
    order = np.array([31, 2, 19, 20, 39, 0])
    batch, found = made.content("train", "int8")
    got = both.batch("train", order)
    np.testing.assert_array_equal(got.tokens_BT, batch.tokens_BT[order % 20])
    back = both.stored("train", order, got)
    np.testing.assert_array_equal(back.taps.values, found.taps.values[order % 20])
    np.testing.assert_array_equal(back.lse_BT, found.lse_BT[order % 20])


@pytest.mark.parametrize("source", ["0.7*{a},{a}", ",", "0*{a}", "x*{a}", "{a}/none"])
def test_sources_that_make_no_sense(whole, source):
    with pytest.raises(UserError):
        features.open_stores(source.format(a=whole))


def test_errors_of_a_thread_that_reads_ahead_are_raised():
    def read(number: int) -> int:
        if number == 3:
            raise UserError("damaged")
        return number

    ahead = read_ahead(range(9), read, threads=2, depth=4)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="damaged"):
        next(ahead)
