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
from jeagle import align, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture
from jeagle.interfaces import Batch
from jeagle.run import assemble, dataset
from jeagle.runtime import distributed
from jeagle.runtime.manifest import finished_manifest

_FORMAT = 1
_SPARE = 1.02  # room asked for beyond what is counted: folders, manifests
_BLOCK = 1024


class Sizes(NamedTuple):
    """Of each row, its tokens, its positions whose taps are kept, and those whose teacher is: int64 [R]."""

    tokens: np.ndarray
    seen: np.ndarray
    kept: np.ndarray


def measure(rows: Batch, form: features.Form) -> Sizes:
    """What each row will hold."""
    found = [np.zeros((len(Sizes._fields), 0), np.int64)]
    for start in range(0, len(rows.tokens_BT), _BLOCK):
        part = Batch(*(np.asarray(array[start : start + _BLOCK]) for array in rows))
        found.append(np.stack([where.sum(axis=1) for where in features.places_of(part, form.aux_at)]))
    return Sizes(*np.concatenate(found, axis=1))


def form_of(config: RunConfig) -> features.Form:
    """What the run's settings keep. UserError where its objective needs more."""
    settings = config.store
    top_k = settings.top_k if settings.teacher == "top_k" else 0
    form = features.Form(settings.aux_dtype, settings.last_dtype, top_k, settings.aux_at)
    check_serves(form, config, "The store asked for")
    return form


def check_serves(form: features.Form, config: RunConfig, where: str) -> None:
    """UserError unless what a store of this form keeps is enough for the run's objective."""
    spec = assemble.objective_spec(config.objective)
    if form.top_k and spec.needs_full_teacher:
        raise UserError(
            f"{where} keeps the {form.top_k} likeliest tokens of each distribution, and {spec.needs_full_teacher}: "
            "give another --objective.loss, or --store.teacher last when the store is made."
        )
    if form.aux_at == "seen" and spec.cross_documents:
        raise UserError(
            f"{where} keeps tapped states only where a slot of the same document sees them, and with "
            "cross_documents slots run on into the next one: make the store with --store.aux-at all, or train with "
            "--objective.cross-documents False."
        )


def about(
    config: RunConfig,
    loaded: assemble.LoadedTarget,
    prepared: dataset.Prepared,
    sizes: dict[str, Sizes],
    aux_layers: Any,
    form: features.Form,
) -> dict[str, Any]:
    """store.json: everything that a reader must know, and everything that must not change.

    UserError for more of the likeliest tokens than there are tokens.
    """
    target, files, hidden = config.target, loaded.files, loaded.target.spec.width
    if form.top_k > loaded.target.spec.vocab:
        raise UserError(f"--store.top-k {form.top_k} is more than the target's {loaded.target.spec.vocab} tokens.")
    made = finished_manifest(prepared.data)["made_from"]
    identity = {"fingerprint": files.fingerprint, "reference": target.ref}
    identity |= {name: getattr(target, name) for name in ("dtype", "weights", "family")}
    total = sum(int(s.tokens.sum()) for s in sizes.values())
    count = sum(len(s.tokens) for s in sizes.values())
    each = bytes_of(form, hidden, len(aux_layers), list(sizes.values())) / max(count, 1)
    batch = config.train.batch_rows
    rows_each = max(round(config.store.segment_mb * 2**20 / max(each, 1)) // batch, 1) * batch
    return {
        "format": _FORMAT,
        "made_from": {
            "target": identity,
            "taps": list(aux_layers),
            "data": made,
            "template_settings": template_settings(config),
            "arrays": form.described(),
        },
        "layout": {"rows_per_segment": rows_each, "row_length": config.data.row_length, "hidden": hidden},
        "splits": {
            split: {"rows": len(s.tokens)} | {name: int(counts.sum()) for name, counts in s._asdict().items()}
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


def bytes_of(form: features.Form, hidden: int, aux_layers: int, sizes: list[Sizes]) -> float:
    """Bytes that rows of these sizes take."""
    tokens, seen, kept = (sum(int(counts.sum()) for counts in each) for each in zip(*sizes, strict=True))
    each = max(tokens, 1)
    return tokens * features.bytes_per_token(hidden, aux_layers, form, kept=kept / each, seen=seen / each)


def check_space(
    place: features.Place,
    units: list[features.Unit],
    sizes: dict[str, Sizes],
    hidden: int,
    aux_layers: int,
    form: features.Form,
) -> None:
    """UserError unless the disk has room for these units."""
    chosen = [Sizes(*(x[unit.rows.start : unit.rows.stop] for x in sizes[unit.split])) for unit in units]
    needed, free = bytes_of(form, hidden, aux_layers, chosen) * _SPARE, place.free_bytes()
    if free is None or needed <= free:
        return
    count = sum(len(s.tokens) for s in chosen)
    more = [] if form.aux in ("int8", "fp8") else ["--store.aux-dtype int8 halves it or better"]
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
        if config.store.aux_dtype in ("int8", "fp8"):
            arrays["taps_channel"] = features.channel_scales(stored.aux.values[real], config.store.aux_dtype)
        last = stored.teacher if config.store.teacher == "last" else None
        if isinstance(last, features.Scaled) and config.store.last_dtype in ("int8", "fp8"):
            arrays["last_channel"] = features.channel_scales(last.values[near], config.store.last_dtype)
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
