"""Stores of hidden states beside plain reads of the same bytes and beside one file a sample, as the peers keep them.

    python -m benchmarks.features --folder /a/folder/on/the/disk

Prints JSON: bytes per token by shape and mode, measured on what lies on disk, and reading speeds with a cold cache.
Each round reads everything once in every way, one after the other, so that all ways meet the same neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jeagle import align, features
from jeagle.features.formats import DTYPES, LARGEST
from jeagle.interfaces import Batch, TopK
from jeagle.runtime.ahead import read_ahead

SHAPES = {"SmolLM2-135M": 576, "8B": 4096, "70B": 8192}
AUX_LAYERS, LENGTH = 3, 2048
SEGMENT = 2**28  # bytes: the default of --store.segment-mb
RNG = np.random.default_rng(0)


def rows(count: int, share: float) -> Batch:
    """Rows without padding, of one document whose end, `share` of it, is an answer."""
    tokens = RNG.integers(1, 50_000, (count, LENGTH), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    supervised = np.broadcast_to(np.arange(LENGTH) >= (1 - share) * LENGTH, tokens.shape)
    return Batch(tokens, np.ones_like(tokens), positions, supervised)


FORMS = {
    "bfloat16": features.StoreFormat("bfloat16", "bfloat16"),
    "int8": features.StoreFormat("int8", "int8"),  # fp8 takes the same bytes
    "int8, top 16": features.StoreFormat("int8", top_k=16),
    "int8, top 64": features.StoreFormat("int8", top_k=64),
    "int8, top 256": features.StoreFormat("int8", top_k=256),
}


def stored(batch: Batch, form: features.StoreFormat, hidden: int) -> features.StoredFeatures:
    """Random bytes of the right types."""
    near = align.near_supervised(batch, xp=np)

    def one(kind: str, *shape: int) -> features.ScaledVectors:
        raw = RNG.integers(0, 200, (*near.shape, *shape, DTYPES[kind].itemsize), dtype=np.uint8)
        values = raw.view(DTYPES[kind])[..., 0]
        if kind not in LARGEST:
            return features.ScaledVectors(values)
        return features.ScaledVectors(
            values, np.ones(values.shape[:-1], np.float32), np.ones((len(near), *shape), np.float32)
        )

    full, ones = (*near.shape, form.top_k), np.ones(near.shape, np.float32)
    top = TopK(RNG.integers(0, 50_000, full, dtype=np.int32), np.ones(full, features.LOG_PROBS), ones)
    teacher = top if form.top_k else one(form.last, hidden)
    return features.StoredFeatures(one(form.aux, AUX_LAYERS, hidden), teacher, np.ones(near.shape, np.int32), ones)


def write(folder: Path, form: features.StoreFormat, hidden: int, count: int, share: float, each: int) -> features.Store:
    """A store of `count` rows, `each` of them a segment."""
    about = {"made_from": {"arrays": form.to_json()}, "splits": {"train": {"rows": count}}}
    writer = features.Writer(
        features.Storage(folder), about | {"layout": {"rows_per_segment": each, "row_length": LENGTH}, "command": ""}
    )
    channels = {"taps_channel": np.ones((AUX_LAYERS, hidden), np.float32), "last_channel": np.ones(hidden, np.float32)}
    writer.commit_tables(channels)
    units = features.work_units({"train": count}, each)
    while taken := writer.take(units):
        batch = rows(len(taken[0].rows), share)
        writer.commit(taken[0], features.ragged_rows(batch, stored(batch, form, hidden)), LENGTH // 8)
    writer.finish()
    return features.Store(str(folder))


def bytes_per_token(folder: Path) -> list[dict[str, Any]]:
    """What lies on disk of one segment, beside the tensors alone of a peer's file of the same tokens."""
    found = []
    for name, hidden in SHAPES.items():
        theirs = (
            AUX_LAYERS + 1
        ) * hidden * 2 + 16  # bfloat16 states and two int64 a token, without their files' overhead
        for mode, form in FORMS.items():
            count = max(SEGMENT // (LENGTH * (AUX_LAYERS + 1) * hidden * DTYPES[form.aux].itemsize), 1)
            for share in (1.0, 0.35):
                store = write(folder / "one", form, hidden, count, share, count)
                segment = next(s for s in store.segments if s.split)
                size = sum(p.stat().st_size for p in (folder / "one" / segment.folder).rglob("*") if p.is_file()) / (
                    LENGTH * count
                )
                row = {"shape": name, "mode": mode, "supervised": share, "bytes": round(size, 1), "peers": theirs}
                found.append(row | {"of_peers": round(size / theirs, 4)})
                shutil.rmtree(folder / "one")
    return found


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: Path) -> int:
    """Reads every file from start to end into one buffer; returns bytes."""
    buffer, total = bytearray(2**22), 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as file:
            while read := file.readinto(buffer):
                total += read
    return total


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - wall, time.process_time() - cpu


def reading(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Reads an 8B-shaped int8 store, all supervised, row by row in random order, and its likes."""
    hidden = SHAPES["8B"]
    store = write(folder / "store", FORMS["int8"], hidden, count, 1.0, 4)
    (folder / "peer").mkdir()
    states = np.zeros((LENGTH, AUX_LAYERS + 1, hidden), ml_dtypes.bfloat16)
    for i in range(count):
        states[:] = RNG.standard_normal(hidden)
        ids = {"token_ids": np.zeros(LENGTH, np.int64), "loss_mask": np.ones(LENGTH, np.int64)}
        save_file({"hidden_states": states} | ids, folder / "peer" / f"hs_{i}.safetensors")
    batch = store.batch("train", range(count))
    one = Batch(*(array[:1] for array in batch))

    def ours() -> None:
        order = RNG.permutation(count).tolist()
        for _ in read_ahead(order, lambda r: store.stored("train", [r], one), threads=2, depth=4):
            pass

    def theirs() -> None:
        def load(i: int) -> Any:
            found = load_file(folder / "peer" / f"hs_{i}.safetensors")
            return found["hidden_states"][:, :-1].reshape(LENGTH, -1), found["hidden_states"][:, -1].copy()

        for _ in read_ahead(RNG.permutation(count).tolist(), load, threads=2, depth=4):
            pass

    taken: dict[str, list[tuple[float, float]]] = {"store": [], "plain": [], "peer": []}
    size = plain(folder / "store" / "segments")
    ways = {"plain": lambda: plain(folder / "store" / "segments"), "store": ours, "peer": theirs}
    for _ in range(rounds):
        for name, work in ways.items():
            forget(folder / ("peer" if name == "peer" else "store"))
            taken[name].append(timed(work))
    found = {name: tuple(float(np.median(x)) for x in zip(*pairs, strict=True)) for name, pairs in taken.items()}
    ratios = [p[0] / s[0] for p, s in zip(taken["plain"], taken["store"], strict=True)]
    return {
        "megabytes": round(size / 1e6),
        "store_mb_s": round(size / 1e6 / found["store"][0]),
        "plain_mb_s": round(size / 1e6 / found["plain"][0]),
        "store_of_plain_by_round": [round(r, 3) for r in ratios],
        "store_of_plain": round(float(np.median(ratios)), 3),
        "tokens_s_of_peer": round(found["peer"][0] / found["store"][0], 3),
        "cpu_s_per_gb": {
            name: round(cpu / (size / 1e9) / (1 + (name == "peer")), 3) for name, (_, cpu) in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {"bytes_per_token": bytes_per_token(Path(folder)), "reading": {}}
        found["reading"] = reading(Path(folder), args.rows, args.rounds)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
