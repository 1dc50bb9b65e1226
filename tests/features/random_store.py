"""Random rows and features, as a target would give them, and a store of them: no model is run."""

from __future__ import annotations

import fnmatch
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jeagle import align, features
from jeagle.features.formats import DTYPES, LARGEST, arrays_by_name
from jeagle.interfaces import Batch, TopK

LENGTH, HIDDEN, AUX_LAYERS, VOCAB = 24, 16, 3, 50
SPLITS = {"train": 20, "held_out": 5}
FORMS = {kind: features.StoreFormat(kind, kind) for kind in DTYPES} | {
    "top_k": features.StoreFormat("bfloat16", top_k=5),
    "int8 and top_k": features.StoreFormat("int8", top_k=1),
}


def rows(count: int, seed: int) -> Batch:
    """Packed rows of one to three documents, with padding; some rows are full, some answers end a row, some are
    followed by a turn that is not one, and some documents have none."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = (np.zeros((count, LENGTH), np.int32) for _ in range(3))
    supervised = np.zeros((count, LENGTH), bool)
    for row in range(count):
        start = 0
        for number in range(1, int(rng.integers(2, 5))):
            length = min(int(rng.integers(4, LENGTH)), LENGTH - start)
            here = slice(start, start + length)
            tokens[row, here] = rng.integers(1, VOCAB, length)
            segments[row, here], positions[row, here] = number, np.arange(length)
            trailing = (row + number) % 3 * length // 3
            supervised[row, start + length // 2 : start + length - trailing] = True
            start += length
    return Batch(tokens, segments, positions, supervised)


def stored(batch: Batch, form: features.StoreFormat, seed: int) -> features.StoredFeatures:
    """Random features of rows; zero where nothing is kept."""
    rng = np.random.default_rng(seed)
    near = align.near_supervised(batch, xp=np)

    def one(kind: str, mask: np.ndarray, *shape: int) -> features.ScaledVectors:
        full = (*mask.shape, *shape)
        wide = mask.reshape(*mask.shape, *(1,) * len(shape))
        values = (rng.standard_normal(full) * 20 * wide).astype(DTYPES[kind])
        if kind not in LARGEST:
            return features.ScaledVectors(values)
        row = (rng.random(full[:-1]) * wide[..., 0]).astype(np.float32)
        return features.ScaledVectors(values, row, np.ones((mask.shape[0], *shape), np.float32))

    greedy = (rng.integers(0, VOCAB, near.shape) * near).astype(np.int32)
    lse = (rng.standard_normal(near.shape) * near).astype(np.float32)
    aux = one(form.aux, batch.segments_BT > 0, AUX_LAYERS, HIDDEN)
    if not form.top_k:
        return features.StoredFeatures(aux, one(form.last, near, HIDDEN), greedy, lse)
    full = (*near.shape, form.top_k)
    ids = (rng.integers(0, VOCAB, full) * near[..., None]).astype(np.int32)
    log_probs = (-10 * rng.random(full) * near[..., None]).astype(np.float16)
    return features.StoredFeatures(
        aux, TopK(ids, log_probs, (rng.random(near.shape) * near).astype(np.float32)), greedy, lse
    )


def about(form: str, **made_from: Any) -> dict[str, Any]:
    data = {"end_token_ids": [1], "target_vocab": VOCAB, "source": "s", "template": "t"}
    return {
        "made_from": {"data": data, "taps": [1, 2, 3], "arrays": FORMS[form].to_json()} | made_from,
        "layout": {"rows_per_segment": 3, "row_length": LENGTH},
        "splits": {split: {"rows": count} for split, count in SPLITS.items()},
        "command": "extract",
    }


def fill(url: str | Path, form: str = "int8", pause: float = 0.0, **made_from: Any) -> int:
    """Writes what is missing of the store that the seeds describe, in one of FORMS; returns the number of segments
    written."""
    if pause:
        random.seed(os.getpid())
    writer = features.Writer(features.Storage(str(url)), about(form, **made_from))
    tables = {"embed": np.ones((VOCAB, HIDDEN), np.float32)}
    for name, shape in (("taps_channel", (AUX_LAYERS, HIDDEN)), ("last_channel", (HIDDEN,))):
        tables[name] = np.random.default_rng(3).random(shape).astype(np.float32)
    writer.commit_tables(tables)
    units, written = features.work_units(SPLITS, 3), 0
    while taken := writer.take(units):
        batch, expected = content(taken[0].split, form)
        time.sleep(random.random() * pause)
        written += writer.commit(taken[0], features.ragged_rows(batch, expected, taken[0].rows), 8)
    writer.finish()
    return written


def content(split: str, form: str) -> tuple[Batch, features.StoredFeatures]:
    """All rows of a side, and what a store must give back for them."""
    seed = list(SPLITS).index(split)
    batch = rows(SPLITS[split], seed)
    return batch, stored(batch, FORMS[form], seed)


def find(url: str, pattern: str) -> str:
    """The first key of a store that fits a pattern."""
    place = features.Storage(url)
    keys = sorted(key.decode() for key in ts.KvStore.open(place.kvstore()).result().list().result())
    return next(key for key in keys if fnmatch.fnmatchcase(key, pattern))


def check_whole(url: str | Path, form: str = "int8") -> None:
    """Every row is there once, with its bytes, every checksum is right, and nothing else lies about."""
    store = features.Store(str(url))
    store.check_complete()
    assert list(features.verify_store(store)) == []
    numbers = sorted((s.split, row) for s in store.segments for row in s.rows)
    assert numbers == sorted((split, row) for split, count in SPLITS.items() for row in range(count))
    for split, count in SPLITS.items():
        order = np.random.default_rng(7).permutation(count)
        batch, expected = content(split, form)
        got = store.batch(split, order)
        for array, wanted in zip(got, batch, strict=True):
            np.testing.assert_array_equal(array, wanted[order])
        back = store.stored(split, order, got)
        ours, theirs = arrays_by_name(back), arrays_by_name(expected)
        assert list(ours) == list(theirs)
        for name, wanted in theirs.items():
            np.testing.assert_array_equal(ours[name].astype(np.float32), wanted[order].astype(np.float32), err_msg=name)
    storage = store.storage
    assert set(storage.names("segments")) == {s.data for s in store.segments}
    assert storage.names("claims") == []
    if storage.path is not None:  # no file beside the keys, such as what a killed process had begun to write
        assert {p.parent.name for p in storage.path.rglob("*.__lock")} <= {"manifests", "claims"}
