"""Training without the target: its rows, tables and features come from stores instead."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jeagle import data, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.agreement import at_hand, recheck, spec_of, stored_tables
from jeagle.extraction.fill import extract
from jeagle.extraction.plan import check_serves, template_settings
from jeagle.interfaces import Batch, Tables
from jeagle.run import assemble, dataset
from jeagle.run.claim import check_folder, new_rows
from jeagle.runtime import distributed
from jeagle.runtime.ahead import read_ahead
from jeagle.runtime.manifest import fingerprint, finished_manifest
from jeagle.runtime.mesh import row_parts
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


def open_stores(config: RunConfig, mesh: Mesh | None = None) -> features.Mixture | None:
    """The run's stores, which fit its settings; None for a run that computes features.

    Args:
      mesh: over which batches will be split; None where only rows are asked for.

    Raises:
      UserError: for a store that is missing, was made from something else, or is unfinished; with --features-rest
        online a store may lack rows.
    """
    if config.features in ("online", "auto"):
        return None
    mixture = features.open_stores(config.features, complete=config.features_rest == "refuse")
    if config.features_rest == "online":
        if len(mixture.stores) > 1:
            raise UserError(
                f"--features-rest online takes the rows of one store: --features {config.features} has more."
            )
        mixture = features.Partial(mixture.stores[0], *(_layout(config, mesh) if mesh else ()))
    first = mixture.stores[0]
    for store in mixture.stores:
        check_serves(store.form, config, f"The store {store}")
        wanted = expected(config, store)
        features.check_fit(store.place, wanted, store.about["made_from"], _DOING)
        alike = {name: first.about["made_from"][name] for name in ("target", "taps", "arrays")}
        features.check_fit(
            store.place, alike, store.about["made_from"], f"Stores are mixed with {first} only if alike."
        )
    return mixture


def _layout(config: RunConfig, mesh: Mesh) -> tuple[features.Layout, Callable[[np.ndarray], np.ndarray]]:
    processes = jax.process_count()
    shards = max(row_parts(mesh) // processes, 1)
    return features.Layout(processes, shards, {"train": config.train.accumulate}), distributed.everywhere


def complete_stores(config: RunConfig, stores: features.Mixture | None, mesh: Mesh) -> features.Mixture | None:
    """The stores that the run's features are read from, once its processes have joined.

    With --features auto, that is the run's own store, which is filled first as far as it is not yet.

    Args:
      stores: of `open_stores`.
    """
    if config.features != "auto":
        return open_stores(config, mesh) if isinstance(stores, features.Partial) else stores
    store = extract(config, str(config.folder / "features"))
    gc.collect()  # the target must not stay beside the draft's training
    return open_stores(dataclasses.replace(config, features=store))


def expected(config: RunConfig, store: features.Store) -> dict[str, Any]:
    """As much of a store's `made_from` as this run can tell, whether or not target and data are on this machine."""
    target = config.target
    wanted: dict[str, Any] = {name: getattr(target, name) for name in ("dtype", "weights", "family")}
    files = at_hand(target.ref)
    if files:
        wanted["fingerprint"] = files.fingerprint
    elif target.ref and not Path(target.ref).expanduser().exists():
        wanted["reference"] = target.ref
    aux_layers = targets.check_aux_layers(target.aux_layers, spec_of(store.about, target.family).layers)
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


def prepare(config: RunConfig, mixture: features.Mixture | None) -> dataset.Prepared:
    """The run's rows and vocabulary tables: out of the stores, or without any, or with one that may lack some, from
    conversations."""
    if mixture is None or isinstance(mixture, features.Partial):
        return dataset.prepare(config)
    check_folder(config)
    abouts = [store.about for store in mixture.stores]
    made = dict(abouts[0]["made_from"]["data"])
    if len(abouts) > 1:
        made["source"] = fingerprint([about["made_from"]["data"] for about in abouts])
    folder = config.folder / "data"
    reused = dataset.found(folder, made)
    if not reused:
        with new_rows(config) as aside:
            statistics = {split: _write_rows(mixture, split, aside / split, made) for split in ("train", "held_out")}
            for name in ("tokenizer.json", "held_out.jsonl", "set_aside.jsonl"):
                _copy(mixture, name, aside)
            manifest = json.loads(mixture.stores[0].data_file("manifest.json") or b"{}")
            statistics = manifest.get("statistics", {}) | statistics if len(abouts) > 1 else manifest["statistics"]
            dataset.write_rows_manifest(aside, config, made, statistics)
    return dataset.finish(config, made, reused=reused)


def _write_rows(mixture: features.Mixture, split: str, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    counts, tokens = np.zeros(made["target_vocab"], np.int64), 0
    total = mixture.rows(split)
    with data.RowWriter(folder, mixture.stores[0].row_length) as writer:
        for start in range(0, total, _ROWS):
            rows = mixture.batch(split, range(start, min(start + _ROWS, total)))
            counts += data.count_tokens(rows, len(counts))
            tokens += int((rows.segments_BT > 0).sum())
            writer.write(rows)
    np.save(folder / "counts.npy", counts)
    return {"rows": total, "tokens": tokens, "supervised_tokens": int(counts.sum())}


def _copy(mixture: features.Mixture, name: str, folder: Path) -> None:
    found = [store.data_file(name) or b"" for store in mixture.stores]
    content = found[0] if name == "tokenizer.json" else b"".join(found)
    if content or name != "tokenizer.json":
        (folder / name).write_bytes(content)


def open_teacher(config: RunConfig, mixture: features.Mixture | None, mesh: Mesh) -> Teacher:
    """The target itself, or what the stores keep of it. UserError for a store that contradicts itself or its target."""
    if mixture is not None and not isinstance(mixture, features.Partial):
        recheck(config, mixture, mesh)
        return _of_stores(mixture.stores[0], mesh)
    loaded = assemble.load_target(config, mesh)
    if isinstance(mixture, features.Partial):
        _check_same_rows(config, mixture, loaded)
        recheck(config, mixture, mesh, loaded)
    return Teacher(
        loaded.target.spec,
        loaded.end_token_ids,
        loaded.files.fingerprint,
        lambda vocabulary: assemble.make_tables(loaded.target, vocabulary, mesh),
        loaded.target.graphdef,
        loaded.target.state,
    )


def _check_same_rows(config: RunConfig, partial: features.Partial, loaded: assemble.LoadedTarget) -> None:
    """UserError unless the store's rows are, number by number, the run's; says how many of them it has."""
    store, prepared = partial.stores[0], finished_manifest(config.folder / "data")
    wanted = {"target": {"fingerprint": loaded.files.fingerprint}, "data": prepared["made_from"]}
    features.check_fit(store.place, wanted, store.about["made_from"], _DOING)
    counts = {split: f"{partial.count_present(split)} of {partial.rows(split)}" for split in ("train", "held_out")}
    if distributed.is_leader():
        print(
            f"features: {store} has {counts['train']} rows and {counts['held_out']} held-out rows; the target computes "
            "the others",
            flush=True,
        )


def _of_stores(store: features.Store, mesh: Mesh) -> Teacher:
    """All stores of a mixture have the same target."""
    made = store.about["made_from"]
    return Teacher(
        spec_of(store.about, made["target"]["family"]),
        tuple(made["data"]["end_token_ids"]),
        made["target"]["fingerprint"],
        lambda vocabulary: stored_tables(store, vocabulary, mesh),
    )


def with_features(
    stream: data.RowStream, start: int, stop: int, mixture: features.Mixture | None
) -> Iterator[tuple[int, int, Batch, features.Stored | None]]:
    """(step, widest, rows, their stored features) for start <= step < stop, read ahead on threads."""
    if mixture is None:
        for step, widest, rows in stream.from_step(start, stop):
            yield step, widest, rows, None
        return

    def read(step: int) -> tuple[int, int, Batch, features.Stored | None]:
        rows = stream.batch(step)
        order, stored = mixture.dealt("train", stream.own_row_numbers(step), rows, stream.row_numbers(step))
        return step, stream.widest(step), Batch(*(array[order] for array in rows)), stored

    yield from read_ahead(range(start, stop), read, threads=2, depth=_AHEAD)


def share_read(mixture: features.Mixture | None, rows: Batch, stored: features.Stored | None) -> float | None:
    """The share of a batch's rows that came from a store; None for a run that does not mix."""
    if not isinstance(mixture, features.Partial):
        return None
    return 0.0 if stored is None else len(stored.greedy_BT) / len(rows.tokens_BT)


def shares(mixture: features.Mixture | None) -> list[tuple[int, float]] | None:
    """(rows, weight) of each store that is drawn from in proportion; None where every row counts once."""
    if mixture is None or mixture.weights is None:
        return None
    return list(zip(mixture.counts("train"), mixture.weights, strict=True))


def top_k(stores: features.Mixture | None) -> int:
    """How many of the likeliest tokens the stores hold of each distribution; 0 where the teacher is whole."""
    return stores.stores[0].form.top_k if stores else 0
