"""Where a run's features, rows and tables come from: the target and the data, or stores."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jeagle import data, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.agreement import check_stores, local_target_files, stored_tables, stored_target_spec
from jeagle.extraction.fill import extract
from jeagle.extraction.plan import check_teacher_suffices, template_settings
from jeagle.interfaces import Batch, Tables
from jeagle.run import assemble, dataset
from jeagle.run.claim import check_folder, new_rows
from jeagle.runtime import distributed
from jeagle.runtime.ahead import read_ahead
from jeagle.runtime.manifest import fingerprint, finished_manifest
from jeagle.targets import TargetFiles, TargetSpec

_ROWS = 256  # read and written at a time
_AHEAD = 4  # batches read before they are needed
_DOING = "Extract anew with these settings, or give those that the store was made with."


class Teacher(NamedTuple):
    """What training needs of a target, wherever it comes from.

    Attributes:
      graphdef, state: of the target; None where its features are read.
      tables: from the draft vocabulary [D] to the frozen rows.
    """

    spec: TargetSpec
    end_token_ids: tuple[int, ...]
    fingerprint: str
    tables: Callable[[np.ndarray], Tables]
    graphdef: Any = None
    state: Any = None


def open_stores(config: RunConfig, *, joined: bool = False) -> features.StoreSet | None:
    """The run's stores, which fit its settings; None for a run whose features are all computed.

    Args:
      joined: whether the run's processes have joined, so that they can agree on which rows a store has.

    Raises:
      UserError: for a store that does not exist, was made from something else, or lacks rows; with --features-rest
        online it may lack rows.
    """
    if config.features in ("online", "auto"):
        return None
    partial = config.features_rest == "online"
    agree = distributed.everywhere if joined else None
    stores = features.open_store_set(config.features, partial=partial, agree=agree)
    if partial and len(stores.members) > 1:
        raise UserError(f"--features-rest online takes the rows of one store: --features {config.features} has more.")
    first = stores.members[0]
    for store in stores.members:
        check_teacher_suffices(store.format, config, f"The store {store}")
        wanted = expected(config, store)
        features.check_fit(store.storage, wanted, store.about["made_from"], _DOING)
        alike = {name: first.about["made_from"][name] for name in ("target", "taps", "arrays")}
        features.check_fit(
            store.storage, alike, store.about["made_from"], f"Stores are read beside {first} only if they are alike."
        )
    return stores


def complete_stores(config: RunConfig, stores: features.StoreSet | None) -> features.StoreSet | None:
    """The stores that the run's features are read from, once its processes have joined.

    With --features auto, that is the run's own store, which is filled first as far as it is not yet.

    Args:
      stores: of `open_stores`.
    """
    if config.features != "auto":
        return open_stores(config, joined=True) if stores is not None and stores.partial else stores
    store = extract(config, str(config.folder / "features"))
    gc.collect()  # the target must not stay beside the draft's training
    return open_stores(dataclasses.replace(config, features=store))


def expected(config: RunConfig, store: features.Store) -> dict[str, Any]:
    """As much of a store's `made_from` as this run can tell, whether or not target and data are on this machine."""
    target = config.target
    wanted: dict[str, Any] = {name: getattr(target, name) for name in ("dtype", "weights", "family")}
    files = local_target_files(target.ref)
    if files:
        wanted["fingerprint"] = files.fingerprint
    elif target.ref and not Path(target.ref).expanduser().exists():
        wanted["reference"] = target.ref
    aux_layers = targets.check_aux_layers(target.aux_layers, stored_target_spec(store.about, target.family).layers)
    return {"target": wanted, "taps": list(aux_layers), **_expected_data(config, files)}


def _expected_data(config: RunConfig, files: TargetFiles | None) -> dict[str, Any]:
    rows = dataset.shaping(config)
    try:
        parts = data.parse_source(config.data.source) if config.data.source else []
        if parts and all(part.files for part in parts):
            rows["source"] = data.source_fingerprint(parts)
    except UserError:
        pass  # the data is not on this machine, and need not be
    tokenizer = None
    if files or (config.target.ref and Path(config.target.ref).expanduser().is_dir()):
        path = Path(config.target.ref).expanduser().resolve()
        try:
            tokenizer = dataset.load_tokenizer(config, files or TargetFiles(config.target.ref, path, "safetensors", ""))
        except (UserError, OSError):
            tokenizer = None
    if tokenizer is None:
        return {"data": rows, "template_settings": template_settings(config)}
    hashes = {"tokenizer": data.tokenizer_hash(tokenizer), "template": data.template_hash(tokenizer)}
    return {"data": rows | hashes}


def prepare(config: RunConfig, stores: features.StoreSet | None) -> dataset.Prepared:
    """The run's rows and vocabulary tables: from its stores where these have all rows, otherwise from conversations."""
    if stores is None or stores.partial:
        return dataset.prepare(config)
    check_folder(config)
    abouts = [store.about for store in stores.members]
    made = dict(abouts[0]["made_from"]["data"])
    if len(abouts) > 1:
        made["source"] = fingerprint([about["made_from"]["data"] for about in abouts])
    folder = config.folder / "data"
    reused = dataset.found(folder, made)
    if not reused:
        with new_rows(config) as aside:
            statistics = {split: _write_rows(stores, split, aside / split, made) for split in ("train", "held_out")}
            for name in ("tokenizer.json", "held_out.jsonl", "rejected.jsonl"):
                _copy(stores, name, aside)
            manifest = json.loads(stores.members[0].data_file("manifest.json") or b"{}")
            statistics = manifest.get("statistics", {}) | statistics if len(abouts) > 1 else manifest["statistics"]
            dataset.write_rows_manifest(aside, config, made, statistics)
    return dataset.finish(config, made, reused=reused)


def _write_rows(stores: features.StoreSet, split: str, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    counts, tokens = np.zeros(made["target_vocab"], np.int64), 0
    total = stores.rows(split)
    with data.RowWriter(folder, stores.members[0].row_length) as writer:
        for start in range(0, total, _ROWS):
            rows = stores.batch(split, range(start, min(start + _ROWS, total)))
            counts += data.count_supervised(rows, len(counts))
            tokens += int((rows.segments_BT > 0).sum())
            writer.write(rows)
    np.save(folder / "counts.npy", counts)
    return {"rows": total, "tokens": tokens, "supervised_tokens": int(counts.sum())}


def _copy(stores: features.StoreSet, name: str, folder: Path) -> None:
    found = [store.data_file(name) or b"" for store in stores.members]
    content = found[0] if name == "tokenizer.json" else b"".join(found)
    if content or name != "tokenizer.json":
        (folder / name).write_bytes(content)


def open_teacher(config: RunConfig, stores: features.StoreSet | None, mesh: Mesh) -> Teacher:
    """The target itself, or what the stores contain of it. UserError for a store that contradicts either."""
    if stores is not None and not stores.partial:
        check_stores(config, stores, mesh)
        return _of_stores(stores.members[0], mesh)
    loaded = assemble.load_target(config, mesh)
    if stores is not None:
        _check_same_rows(config, stores, loaded)
        check_stores(config, stores, mesh, loaded)
    return Teacher(
        loaded.target.spec,
        loaded.end_token_ids,
        loaded.files.fingerprint,
        lambda vocabulary: assemble.make_tables(loaded.target, vocabulary, mesh),
        loaded.target.graphdef,
        loaded.target.state,
    )


def _check_same_rows(config: RunConfig, partial: features.StoreSet, loaded: assemble.LoadedTarget) -> None:
    """Raises UserError unless the store's rows are, number by number, the run's; prints how many of them it has."""
    store, prepared = partial.members[0], finished_manifest(config.folder / "data")
    wanted = {"target": {"fingerprint": loaded.files.fingerprint}, "data": prepared["made_from"]}
    features.check_fit(store.storage, wanted, store.about["made_from"], _DOING)
    counts = {split: f"{partial.count_present(split)} of {partial.rows(split)}" for split in ("train", "held_out")}
    if distributed.is_leader():
        print(
            f"features: {store} has {counts['train']} rows and {counts['held_out']} held-out rows; the target computes "
            "the batches that need others",
            flush=True,
        )


def _of_stores(store: features.Store, mesh: Mesh) -> Teacher:
    """What a store contains of its target, which is the same for all stores of a set."""
    made = store.about["made_from"]
    return Teacher(
        stored_target_spec(store.about, made["target"]["family"]),
        tuple(made["data"]["end_token_ids"]),
        made["target"]["fingerprint"],
        lambda vocabulary: stored_tables(store, vocabulary, mesh),
    )


def with_features(
    stream: data.RowStream, start: int, stop: int, stores: features.StoreSet | None
) -> Iterator[tuple[int, int, Batch, features.StoredFeatures | None]]:
    """Yields what the steps from `start` to `stop` - 1 read. Threads read ahead.

    Yields:
      (step, the most live slots of a row of the global batch, this process's rows, their stored features). The features
      are None, on all processes alike, where the target computes those of the whole batch.
    """

    def read(step: int) -> tuple[int, int, Batch, features.StoredFeatures | None]:
        rows, stored = stream.batch(step), None
        if stores is not None and stores.has_all("train", stream.row_numbers(step)):
            stored = stores.stored("train", stream.own_row_numbers(step), rows)
        return step, stream.widest(step), rows, stored

    yield from read_ahead(range(start, stop), read, threads=2, depth=_AHEAD)


def share_read(stores: features.StoreSet | None, stored: features.StoredFeatures | None) -> float | None:
    """1.0 where a batch was read from a store and 0.0 where it was computed; None for a run that does not mix."""
    if stores is None or not stores.partial:
        return None
    return float(stored is not None)


def top_k(stores: features.StoreSet | None) -> int:
    """How many of the likeliest tokens the stores contain of each distribution; 0 where the teacher is whole."""
    return stores.members[0].format.top_k if stores else 0
