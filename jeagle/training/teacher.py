"""Where a run's features, rows and tables come from: the target and the data, or stores."""

import contextlib
import dataclasses
import gc
import json
from collections.abc import Callable
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
from jeagle.interfaces import Tables
from jeagle.places import same_place
from jeagle.run import assemble, dataset
from jeagle.run.claim import check_folder, new_rows
from jeagle.runtime import distributed
from jeagle.runtime.manifest import fingerprint, finished_manifest
from jeagle.targets import TargetFiles, TargetSpec

_ROWS = 256  # read and written at a time


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
    stores = features.StoreSet(config.features, partial=partial, agree=agree)
    if partial and len(stores.members) > 1:
        raise UserError(f"--features-rest online takes the rows of one store: --features {config.features} has more.")
    first = stores.members[0]
    for store in stores.members:
        check_teacher_suffices(store.format, config, f"The store {store}")
        features.check_fit(store.storage, expected(config, store), store.about["made_from"], _remedy(store))
        alike = {name: first.about["made_from"][name] for name in ("target", "taps", "arrays")}
        features.check_fit(
            store.storage, alike, store.about["made_from"], f"Stores are read beside {first} only if they are alike."
        )
    return stores


def _remedy(store: features.Store) -> str:
    again = "Import the files" if store.about.get("imported") else "Extract"
    return f"{again} anew with these settings, or give those that the store was made with."


def expected(config: RunConfig, store: features.Store) -> dict[str, Any]:
    """As much of a store's `made_from` as this run can tell, whether or not target and data are on this machine."""
    target, path = config.target, Path(config.target.ref).expanduser()
    wanted: dict[str, Any] = {name: getattr(target, name) for name in ("dtype", "weights", "family")}
    files = local_target_files(target.ref)
    if files:
        wanted["fingerprint"] = files.fingerprint
    elif target.ref and not path.exists():
        stored = store.about["made_from"]["target"]["reference"]
        wanted["reference"] = stored if same_place(stored, target.ref) else target.ref
    aux_layers = targets.check_aux_layers(target.aux_layers, stored_target_spec(store.about, target.family).layers)
    rows, imported = dataset.shaping(config), bool(store.about.get("imported"))
    if imported:  # its rows are those of the imported files, whatever conversations the settings name
        rows = {name: rows[name] for name in ("row_length", "held_out")}
    with contextlib.suppress(UserError):  # the data is not on this machine, and need not be
        parts = (
            data.parse_source(config.data.source, config.data.columns) if config.data.source and not imported else []
        )
        if parts and all(part.files for part in parts):
            rows["source"] = data.source_fingerprint(parts)
    made = {"target": wanted, "taps": list(aux_layers), "data": rows}
    if files or (target.ref and path.is_dir()):
        with contextlib.suppress(UserError, OSError):  # a folder without a tokenizer
            files = files or TargetFiles(target.ref, path.resolve(), "safetensors", "")
            tokenizer = dataset.load_tokenizer(config, files)
            rows["tokenizer"] = data.tokenizer_hash(tokenizer)
            rows |= {} if imported else {"template": data.template_hash(tokenizer)}
            return made
    return made if imported else made | {"template_settings": template_settings(config)}


def known_target(config: RunConfig, stores: features.StoreSet | None) -> tuple[TargetSpec, str]:
    """What is known of the run's target before it is loaded, and its fingerprint; a store's where that has all rows."""
    if stores is not None and not stores.partial:
        about = stores.members[0].about
        made = about["made_from"]["target"]
        return stored_target_spec(about, made["family"]), made["fingerprint"]
    return assemble.target_spec(config)


def prepare_inputs(config: RunConfig, stores: features.StoreSet | None) -> dataset.Prepared:
    """The run's rows and vocabulary tables: from its stores where these have all rows, otherwise from conversations."""
    if stores is None or stores.partial:
        return dataset.prepare(config)
    check_folder(config)
    first, *others = stores.members
    made = dict(first.about["made_from"]["data"])
    if others:
        made["source"] = fingerprint([store.about["made_from"]["data"] for store in stores.members])
    reused = dataset.found(config, made)
    if not reused:
        with new_rows(config, made) as aside:
            statistics = json.loads(first.data_file("manifest.json") or b"{}").get("statistics", {})
            for split in features.SPLITS:
                every = range(stores.rows(split))
                batches = (stores.batch(split, every[start : start + _ROWS]) for start in every[::_ROWS])
                counted = dataset.write_split(aside / split, batches, first.row_length, made["target_vocab"])
                if others:
                    statistics[split] = counted
            if tokenizer := first.data_file("tokenizer.json"):
                (aside / "tokenizer.json").write_bytes(tokenizer)
            for name in ("held_out.jsonl", "rejected.jsonl"):
                (aside / name).write_bytes(b"".join(store.data_file(name) or b"" for store in stores.members))
            dataset.write_rows_manifest(aside, config, made, statistics)
    return dataset.finish(config, reused=reused)


def open_teacher(
    config: RunConfig, stores: features.StoreSet | None, prepared: dataset.Prepared, mesh: Mesh
) -> tuple[features.StoreSet | None, Teacher]:
    """The stores that the run's features are read from, and the target itself or what the stores contain of it.

    With --features auto the store is the run's own, which is filled first as far as it is not yet. The run's processes
    have joined.

    Args:
      stores: of `open_stores`. prepared: of `prepare_inputs`.

    Raises:
      UserError: for a store that contradicts itself, the target or the rows.
    """
    filled = False
    if config.features == "auto":
        own = str(config.folder / "features")
        filled = extract(config, own, prepared)
        gc.collect()  # the target must not stay beside the draft's training
        stores = open_stores(dataclasses.replace(config, features=own))
    elif stores is not None and stores.partial:
        stores = open_stores(config, joined=True)
    if stores is not None and not stores.partial:
        check_stores(config, stores, mesh, None, compare=not filled)
        store = stores.members[0]  # what it contains of the target is the same for all stores of a set
        made = store.about["made_from"]
        return stores, Teacher(
            stored_target_spec(store.about, made["target"]["family"]),
            tuple(made["data"]["end_token_ids"]),
            made["target"]["fingerprint"],
            lambda vocabulary: stored_tables(store, vocabulary, mesh),
        )
    loaded = assemble.load_target(config, mesh)
    if stores is not None:
        _check_same_rows(config, stores, loaded)
        check_stores(config, stores, mesh, loaded, compare=True)
    return stores, Teacher(
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
    features.check_fit(store.storage, wanted, store.about["made_from"], _remedy(store))
    if distributed.is_leader():
        train, held_out = (f"{partial.count_present(split)} of {partial.rows(split)}" for split in features.SPLITS)
        print(
            f"features: {store} has {train} rows and {held_out} held-out rows; the target computes the batches that "
            "need others",
            flush=True,
        )
