"""Rows come back as they were written, writers share the work, damage is detected, and other stores are refused."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jeagle import features
from jeagle.errors import UserError
from jeagle.features import writer as writing
from jeagle.features.manifests import sealed
from tests.features import random_store

FOLDER = pytest.mark.parametrize("root", ["a folder"], indirect=True)  # the kind of place makes no difference


@pytest.fixture(scope="module")
def whole(root) -> str:
    """A finished int8 store. Tests leave it whole."""
    url = f"{root}/whole"
    assert random_store.fill(url) == 9
    return url


@contextlib.contextmanager
def harmed(url: str, pattern: str, harm: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """A store of which one file is meanwhile another, or gone."""
    place, key = features.Storage(url), random_store.find(url, pattern)
    before = place.read(key)
    after = harm(before)
    place.delete(key) if after is None else place.write(key, after)
    try:
        yield
    finally:
        place.write(key, before)


@pytest.mark.parametrize("form", random_store.FORMS)
def test_rows_come_back_as_they_were(tmp_path, form):
    random_store.fill(tmp_path / "s", form)
    random_store.check_whole(tmp_path / "s", form)
    assert features.Store(str(tmp_path / "s")).format == random_store.FORMS[form]


@FOLDER
def test_padding_and_unneeded_teachers_are_not_stored(whole):
    store = features.Store(whole)
    batch, _ = random_store.content("train", "int8")
    segments = [s for s in store.segments if s.split == "train"]
    assert sum(s.arrays["taps"]["shape"][0] for s in segments) == (batch.segments_BT > 0).sum()
    assert 0 < sum(s.arrays["last"]["shape"][0] for s in segments) < (batch.segments_BT > 0).sum()


ARRAYS = {
    "of two types": {"taps": "int8", "last": "int8"},
    "of positions": {"taps": "int8", "taps_at": "all", "teacher": "last", "last": "int8"},
}


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS.keys())
def test_stores_of_earlier_versions_are_read(tmp_path, arrays):
    """Their store.json has other entries about arrays, and the segments of some count aux hidden states."""
    random_store.fill(tmp_path / "s")
    rewrite(tmp_path / "s" / "store.json", lambda tree: tree["made_from"].update(arrays=arrays))
    for path in (tmp_path / "s" / "manifests").iterdir():
        rewrite(path, lambda tree: tree.update({"seen": []} if "taps_at" in arrays else {}))
    (tmp_path / "s" / "index.json").unlink()
    random_store.check_whole(tmp_path / "s")
    assert random_store.fill(tmp_path / "s") == 0  # it is the same store


def test_a_store_without_some_aux_hidden_states_is_refused(tmp_path):
    random_store.fill(tmp_path / "s")
    rewrite(tmp_path / "s" / "store.json", lambda tree: tree["made_from"]["arrays"].update(taps_at="seen"))
    with pytest.raises(UserError, match=r"store .* was made with --store.aux-at seen .*: extract the features again"):
        features.Store(str(tmp_path / "s"))


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Changes a sealed file, and seals it again."""
    tree = json.loads(path.read_text())
    del tree["checksum"]
    change(tree)
    path.write_bytes(sealed(tree))


def test_writers_at_once_share_the_work(place):
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: random_store.fill(place, pause=0.01), range(4)))
    assert sum(counts) == 9
    random_store.check_whole(place)


def test_of_many_writers_of_a_key_exactly_one_is_the_first(place):
    one = features.Storage(place)
    with ThreadPoolExecutor(8) as pool:
        for key in ("claims/a", "an odd name: ü ~+&=%25?#.json"):
            first = list(pool.map(lambda i, key=key: one.write_new(key, bytes([i])), range(8)))
            assert sum(first) == 1 and one.read(key) == bytes([first.index(True)])
    assert one.names("claims") == ["a"] == one.names("claims", "a") and one.names("claims", "b") == []
    one.delete("claims")
    assert one.read("claims/a") is None and one.names("claims") == []


def test_two_writers_of_the_same_segment_leave_one(place):
    place = features.Storage(place)
    writers = [features.Writer(place, random_store.about("int8")) for _ in range(2)]
    unit = features.work_units(random_store.SPLITS, 3)[1]
    segment_rows = features.ragged_rows(*random_store.content("train", "int8"), unit.rows)
    assert [w.commit(unit, segment_rows, 8) for w in writers] == [True, False]
    assert len(place.names("segments")) == 1


def test_the_segment_of_a_dead_writer_is_made_again(place):
    one = features.Storage(place)
    dead = features.Writer(one, random_store.about("int8"))
    unit = features.work_units(random_store.SPLITS, 3)[0]
    assert dead.take_one(unit)
    key = f"claims/{unit.name}.json"
    one.write(key, json.dumps(json.loads(one.read(key)) | {"writer": "another", "started": "before"}).encode())
    one.write(f"segments/{unit.name}.gone/taps/zarr.json", b"{")
    assert random_store.fill(place) == 9
    assert f"{unit.name}.gone" not in one.names("segments") and one.names("claims") == []
    assert sorted(number for s in features.Store(place).segments if s.split == unit.split for number in s.rows) == [
        *range(20)
    ]


def test_an_unfinished_store_is_refused(place):
    writer = features.Writer(features.Storage(place), random_store.about("int8"))
    unit = features.work_units(random_store.SPLITS, 3)[0]
    writer.commit(unit, features.ragged_rows(*random_store.content("train", "int8"), unit.rows), 8)
    with pytest.raises(UserError, match="22 of 25 rows are missing, and its tables"):
        features.StoreSet(place)


@FOLDER
def test_a_store_made_from_something_else_is_not_overwritten(whole):
    with pytest.raises(UserError, match=r"arrays.last, arrays.taps, taps differ .*int8.*fp8"):
        random_store.fill(whole, "fp8", taps=[1, 2, 4])
    with pytest.raises(UserError, match=r"arrays.taps, arrays.teacher, arrays.top_k differ"):
        random_store.fill(whole, "top_k")
    random_store.check_whole(whole)


def faults(folder: Path) -> list:
    """What verify finds, or why the store does not even open."""
    try:
        return list(features.verify_store(features.Store(str(folder))))
    except UserError as error:
        return [error]


@FOLDER
def test_any_flipped_byte_is_found(whole, tmp_path):
    """One random bit in every file of a segment, of the tables, and of their manifests."""
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
    assert list(features.verify_store(features.Store(str(copy)))) == []


HARMS = {"flip": lambda data: data[:10] + bytes([data[10] ^ 4]) + data[11:], "cut": lambda data: data[:-7]}


@pytest.mark.parametrize("harm", [*HARMS, "remove"])
def test_damage_stops_a_reader(whole, harm):
    with harmed(whole, "segments/train-000002.*/taps/c/0/0/0", HARMS.get(harm, lambda data: None)):
        store = features.Store(whole)
        with pytest.raises(UserError, match="damaged: taps of segment train-000002"):
            store.stored("train", range(20), store.batch("train", range(20)))


def test_damaged_segments_are_pruned_and_made_again(whole):
    place = features.Storage(whole)
    for pattern in ("train-000002.*/last/c/0/0", "held_out-000001.*/tokens/c/0", "tables.*/embed/zarr.json"):
        key = random_store.find(whole, f"segments/{pattern}")
        place.write(key, place.read(key)[:-1] + b"x")
    place.write("segments/train-000003.leftover/taps/zarr.json", b"{")
    damaged = [segment for segment, _ in features.verify_store(features.Store(whole))]
    assert damaged == ["held_out-000001", "tables", "train-000002"]
    gone = features.prune_store(place, damaged)
    assert "segments/train-000003.leftover" in gone
    assert features.Store(whole).missing() == 2 + 3
    assert random_store.fill(whole) == 2
    random_store.check_whole(whole)


def test_a_segment_that_is_finished_while_prune_runs_stays(tmp_path, monkeypatch):
    """A writer drops its claim once its manifest is there, which prune may have looked for a moment before."""
    place = features.Storage(tmp_path)
    writer = features.Writer(place, random_store.about("int8"))
    first, second = features.work_units(random_store.SPLITS, 3)[:2]
    batch, expected = random_store.content("train", "int8")
    writer.commit(first, features.ragged_rows(batch, expected, first.rows), 8)
    assert writer.take_one(second)
    place.write(f"segments/{second.name}.{writer.claims.writer}/begun", b"")
    read_segment, left = writing.read_segment, [second]

    def meanwhile(place: features.Storage, name: str) -> features.Segment | None:
        if left:
            writer.commit(unit := left.pop(), features.ragged_rows(batch, expected, unit.rows), 8)
        return read_segment(place, name)

    monkeypatch.setattr(writing, "read_segment", meanwhile)
    assert features.prune_store(place, []) == []
    store = features.Store(str(tmp_path))
    assert store.present("train") == [*range(6)] and list(features.verify_store(store)) == []


@FOLDER
def test_a_lost_or_stale_index_is_made_anew(whole):
    for harm in (None, b"{"):
        with harmed(whole, "index.json", lambda data, harm=harm: harm):
            random_store.check_whole(whole)
