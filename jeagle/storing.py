"""The store that a run's rows would make: what it says of itself, and the room that it needs."""

from __future__ import annotations

import datetime
import math
import shlex
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import jeagle
from jeagle import align, assemble, dataset, features, targets
from jeagle.capture import Capture
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.joints import Batch
from jeagle.runtime import distributed
from jeagle.runtime.manifest import finished_manifest

_FORMAT = 1
_SPARE = 1.02  # room asked for beyond what is counted: folders, manifests
_BLOCK = 1024


class Sizes(NamedTuple):
    """Tokens of each row, and positions whose `last` is kept: int64 [R]."""

    tokens: np.ndarray
    kept: np.ndarray


def measure(rows: Batch) -> Sizes:
    """What each row will hold."""
    tokens, kept = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(rows.tokens_BT), _BLOCK):
        part = Batch(*(np.asarray(array[start : start + _BLOCK]) for array in rows))
        tokens.append((part.segments_BT > 0).sum(axis=1))
        kept.append(align.near_supervised(part, xp=np).sum(axis=1))
    return Sizes(np.concatenate(tokens), np.concatenate(kept))


def about(
    config: RunConfig, loaded: assemble.LoadedTarget, prepared: dataset.Prepared, sizes: dict[str, Sizes], taps: Any
) -> dict[str, Any]:
    """store.json: everything that a reader must know, and everything that must not change."""
    target, files, hidden = config.target, loaded.files, loaded.target.spec.width
    made = finished_manifest(prepared.data)["made_from"]
    identity = {"fingerprint": files.fingerprint, "reference": target.ref}
    identity |= {name: getattr(target, name) for name in ("dtype", "weights", "family")}
    total = sum(int(s.tokens.sum()) for s in sizes.values())
    count = sum(len(s.tokens) for s in sizes.values())
    each = bytes_of(config, hidden, len(taps), list(sizes.values())) / max(count, 1)
    batch = config.train.batch_rows
    rows_each = max(round(config.store.segment_mb * 2**20 / max(each, 1)) // batch, 1) * batch
    return {
        "format": _FORMAT,
        "made_from": {
            "target": identity,
            "taps": list(taps),
            "data": made,
            "template_settings": template_settings(config),
            "arrays": {"taps": config.store.taps, "last": config.store.last},
        },
        "layout": {"rows_per_segment": rows_each, "row_length": config.data.row_length, "hidden": hidden},
        "splits": {
            split: {"rows": len(s.tokens), "tokens": int(s.tokens.sum()), "kept": int(s.kept.sum())}
            for split, s in sizes.items()
        },
        "tokens": total,
        "target_config": targets.open_weights(files).config,
        "versions": {"jeagle": jeagle.__version__}
        | {name: version(name) for name in ("jax", "tensorstore", "numpy", "ml_dtypes")},
        "command": shlex.join(["python", "-m", "jeagle.extract", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def template_settings(config: RunConfig) -> dict[str, str]:
    """What chooses the template, where the tokenizer is not at hand to tell what it is."""
    names = ("template", "user_header", "assistant_header", "end_of_turn")
    return {name: getattr(config.data, name) for name in names}


def bytes_of(config: RunConfig, hidden: int, taps: int, sizes: list[Sizes]) -> float:
    """Bytes that rows of these sizes take."""
    tokens, kept = sum(int(s.tokens.sum()) for s in sizes), sum(int(s.kept.sum()) for s in sizes)
    kinds = (config.store.taps, config.store.last)
    return tokens * features.bytes_per_token(hidden, taps, *kinds, kept=kept / max(tokens, 1))


def check_space(
    config: RunConfig,
    place: features.Place,
    units: list[features.Unit],
    sizes: dict[str, Sizes],
    hidden: int,
    taps: int,
) -> None:
    """UserError unless the disk has room for these units."""
    chosen = [Sizes(*(x[unit.rows.start : unit.rows.stop] for x in sizes[unit.split])) for unit in units]
    needed, free = bytes_of(config, hidden, taps, chosen) * _SPARE, place.free_bytes()
    if free is None or needed <= free:
        return
    count = sum(len(s.tokens) for s in chosen)
    more = [] if config.store.taps in ("int8", "fp8") else ["--store.taps int8 halves it or better"]
    advice = "; ".join([*more, "--data.max-conversations takes fewer", "--features online needs none"])
    raise UserError(
        f"The store needs {needed / 1e9:.4g} GB for {count} rows, the disk of {place} has {free / 1e9:.4g} GB free, "
        f"which fits {math.floor(count * free / needed)} rows: make room, or choose another --out ({advice})."
    )


def copy_data(prepared: dataset.Prepared, place: features.Place) -> None:
    """What a run needs of its data folder besides rows."""
    if distributed.is_leader():
        for name in ("manifest.json", "tokenizer.json", "held_out.jsonl"):
            place.write_new(f"{features.DATA}/{name}", (prepared.data / name).read_bytes())


def commit_tables(
    config: RunConfig, writer: features.Writer, loaded: assemble.LoadedTarget, whole: Capture, rows: Batch
) -> dict[str, np.ndarray]:
    """Writes the target's frozen rows and the channels' scales, unless they are there; returns the scales."""
    there = _agreed(int("tables" in features.finished(writer.place)))
    if not there:
        share = config.train.batch_rows // jax.process_count()
        first = block(rows, range(min(share, len(rows.tokens_BT))), share)
        stored, model = whole(first), loaded.target.model()
        arrays = {"embed": _everywhere(model.embed_tokens[...]), "norm": _everywhere(model.norm[...])}
        if not loaded.target.spec.tied:
            arrays["head"] = _everywhere(model.head_rows())
        near, real = align.near_supervised(first, xp=np), first.segments_BT > 0
        if config.store.taps in ("int8", "fp8"):
            arrays["taps_channel"] = features.channel_scales(stored.taps.values[real], config.store.taps)
        if config.store.last in ("int8", "fp8"):
            arrays["last_channel"] = features.channel_scales(stored.last.values[near], config.store.last)
        if distributed.is_leader():
            writer.commit_tables(lambda: arrays)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tables of the store")
    return features.Store(str(writer.place)).channels


def _everywhere(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _agreed(value: int) -> int:
    """What the leader says."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def block(rows: Batch, numbers: range, size: int) -> Batch:
    """Rows by number, padded with empty ones to `size`."""
    here = slice(numbers.start, numbers.start + len(numbers))
    missing = size - len(numbers)
    return Batch(*(np.pad(np.asarray(array[here]), ((0, missing), (0, 0))) for array in rows))
