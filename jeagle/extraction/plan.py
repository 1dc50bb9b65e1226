"""The store that a run's rows make: its store.json, the disk space that it needs, and its tables."""

import datetime
import math
import shlex
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

import jeagle
from jeagle import align, data, features, targets
from jeagle.config import RunConfig, to_json
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture
from jeagle.interfaces import Batch
from jeagle.places import absolute
from jeagle.run import assemble, dataset
from jeagle.runtime import distributed
from jeagle.runtime.manifest import finished_manifest
from jeagle.targets import TargetSpec

_MARGIN = 1.02  # of the counted disk space, for folders and manifests
_BLOCK = 1024  # rows that are counted at a time
_ONE_BYTE = ("int8", "fp8")


class RowSizes(NamedTuple):
    """What each row costs: its tokens, and its positions whose teacher is stored."""

    tokens: Int[np.ndarray, " R"]
    teachers: Int[np.ndarray, " R"]


class StorePlan(NamedTuple):
    """A store that is about to be filled.

    Attributes:
      writer: of the store.
      units: all units of work, finished or not.
      rows: all rows of each split.
      sizes: the sizes of these rows.
      aux_layers: the layer boundaries whose hidden states are stored.
      width: the most positions of a row whose teacher is stored, a multiple of 16.
      channels: the scales of channels, as the store's tables have them.
    """

    writer: features.Writer
    units: list[features.WorkUnit]
    rows: dict[str, Batch]
    sizes: dict[str, RowSizes]
    aux_layers: tuple[int, ...]
    width: int
    channels: dict[str, np.ndarray]


def plan_store(
    config: RunConfig,
    out: str,
    loaded: assemble.LoadedTarget,
    prepared: dataset.Prepared,
    mesh: Mesh,
    *,
    imported: str = "",
) -> StorePlan:
    """Begins the store at `out`, or opens it to go on with it, and writes what belongs to no row.

    Args:
      imported: the trainer whose files the rows and features come from; empty where they are the run's own.

    Raises:
      UserError: for a store that was made from something else, a disk without room for what is missing, or more of the
        likeliest tokens than the target has tokens.
    """
    spec = loaded.target.spec
    form = store_format(config, spec)
    aux_layers = targets.check_aux_layers(config.target.aux_layers, spec.layers)
    rows = {split: data.load_rows(prepared.data / split) for split in features.SPLITS}
    sizes = {split: row_sizes(batch) for split, batch in rows.items()}
    bare, whole = (features.bytes_per_token(spec.width, len(aux_layers), form, share) for share in (0.0, 1.0))
    bytes_of_rows = {split: s.tokens * bare + s.teachers * (whole - bare) for split, s in sizes.items()}
    every, batch = np.concatenate(list(bytes_of_rows.values())), config.train.batch_rows
    mean = max(every.sum() / max(len(every), 1), 1.0)
    rows_each = max(round(config.store.segment_mb * 2**20 / mean) // batch, 1) * batch
    about = {
        "made_from": made_from(config, loaded.files, aux_layers, prepared),
        "layout": {"rows_per_segment": rows_each, "row_length": config.data.row_length, "hidden": spec.width},
        "splits": {
            split: {"rows": len(s.tokens), "tokens": int(s.tokens.sum()), "kept": int(s.teachers.sum())}
            for split, s in sizes.items()
        },
        "tokens": sum(int(s.tokens.sum()) for s in sizes.values()),
        "target_config": targets.open_weights(loaded.files).config,
        "versions": {"jeagle": jeagle.__version__}
        | {name: version(name) for name in ("jax", "tensorstore", "numpy", "ml_dtypes")},
        "command": shlex.join(
            ["python", "-m", f"jeagle.{'import_features' if imported else 'extract'}", *sys.argv[1:]]
        ),
        "imported": imported,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    writer = features.Writer(features.Storage(out), about)
    counts, rows_each = {split: len(s.tokens) for split, s in sizes.items()}, writer.about["layout"]["rows_per_segment"]
    units = features.work_units(counts, rows_each)
    _check_space(writer, units, bytes_of_rows, form)
    if distributed.is_leader():
        for name in ("manifest.json", "tokenizer.json", "held_out.jsonl"):
            writer.storage.write_new(f"{features.DATA}/{name}", (prepared.data / name).read_bytes())
    most = max(int(s.teachers.max(initial=1)) for s in sizes.values())
    width = min(-(-most // 16) * 16, config.data.row_length)
    _commit_tables(config, writer, loaded, Capture(loaded.target, aux_layers, mesh, width=width), rows["train"])
    return StorePlan(writer, units, rows, sizes, aux_layers, width, features.Store(out).channels)


def made_from(
    config: RunConfig, files: targets.TargetFiles, aux_layers: tuple[int, ...], prepared: dataset.Prepared
) -> dict[str, Any]:
    """Everything that a store depends on, as store.json has it."""
    target = config.target
    identity = {name: getattr(target, name) for name in ("dtype", "weights", "family")}
    return {
        "target": {"fingerprint": files.fingerprint, "reference": absolute(target.ref, ())} | identity,
        "taps": list(aux_layers),
        "data": finished_manifest(prepared.data)["made_from"],
        "template_settings": template_settings(config),
        "arrays": store_format(config).to_json(),
    }


def row_sizes(rows: Batch) -> RowSizes:
    """The size of each row."""
    counted = [np.zeros((2, 0), np.int64)]
    for start in range(0, len(rows.tokens_BT), _BLOCK):
        part = Batch(*(np.asarray(array[start : start + _BLOCK]) for array in rows))
        counted.append(np.stack([(part.segments_BT > 0).sum(axis=1), align.near_supervised(part, xp=np).sum(axis=1)]))
    return RowSizes(*np.concatenate(counted, axis=1))


def store_format(config: RunConfig, target: TargetSpec | None = None) -> features.StoreFormat:
    """The format that the run's settings ask for.

    UserError where the run's objective needs more, or the target, if it is known, has fewer tokens.
    """
    settings = config.store
    top_k = settings.top_k if settings.teacher == "top_k" else 0
    form = features.StoreFormat(settings.aux_dtype, settings.last_dtype, top_k)
    if target is not None and form.top_k > target.vocab:
        raise UserError(f"--store.top-k {form.top_k} is more than the target's {target.vocab} tokens.")
    check_teacher_suffices(form, config, "The store that these settings make")
    return form


def check_teacher_suffices(form: features.StoreFormat, config: RunConfig, where: str) -> None:
    """Raises UserError where the run's objective needs more of a teacher than a store of this format contains.

    Args:
      where: names the store at the start of the message.
    """
    needs = assemble.objective_spec(config.objective).needs_full_teacher
    if form.top_k and needs:
        raise UserError(
            f"{where} contains only the {form.top_k} likeliest tokens of each distribution, and {needs}: give another "
            "--objective.loss, or --store.teacher last when the store is made."
        )


def template_settings(config: RunConfig) -> dict[str, str]:
    """The settings that choose the chat template, to compare where no tokenizer is on this machine."""
    settings = to_json(config)["data"]
    return {name: settings[name] for name in ("template", "user_header", "assistant_header", "end_of_turn")}


def _check_space(
    writer: features.Writer,
    units: list[features.WorkUnit],
    bytes_of_rows: dict[str, np.ndarray],
    form: features.StoreFormat,
) -> None:
    """Raises UserError unless the disk has room for the units that nobody has finished."""
    sizes = [bytes_of_rows[unit.split][unit.rows.start : unit.rows.stop] for unit in writer.pending(units)]
    needed, count = sum(float(each.sum()) for each in sizes) * _MARGIN, sum(map(len, sizes))
    free = writer.storage.free_bytes()
    if free is None or needed <= free:
        return
    smaller = [] if form.aux in _ONE_BYTE else ["--store.aux-dtype int8 needs at most half"]
    advice = "; ".join([*smaller, "--data.max-conversations takes fewer", "--features online needs none"])
    raise UserError(
        f"The store needs {needed / 1e9:.4g} GB for {count} rows, the disk of {writer.storage} has {free / 1e9:.4g} GB "
        f"free, which fits {math.floor(count * free / needed)} rows: make room, or give another --out ({advice})."
    )


def _commit_tables(
    config: RunConfig, writer: features.Writer, loaded: assemble.LoadedTarget, exact: Capture, rows: Batch
) -> None:
    """Writes the target's frozen rows and the scales of channels, unless they are there; all processes wait for it.

    Args:
      exact: captures in float32, for the scales.
    """
    if not distributed.anywhere(features.is_finished(writer.storage, features.TABLES)):
        share = config.train.batch_rows // jax.process_count()
        first = padded_rows(rows, range(min(share, len(rows.tokens_BT))), share)
        stored: Any = exact(first)
        model = loaded.target.model()
        frozen = {"embed": model.embed_tokens[...], "norm": model.norm[...]}
        if not loaded.target.spec.tied:
            frozen["head"] = model.head_rows()
        arrays = multihost_utils.process_allgather(frozen, tiled=True)  # they may be split over processes
        if config.store.aux_dtype in _ONE_BYTE:
            aux = stored.aux.values[first.segments_BT > 0]
            arrays["taps_channel"] = features.channel_scales(aux, config.store.aux_dtype)
        if config.store.teacher == "last" and config.store.last_dtype in _ONE_BYTE:
            last = stored.teacher.values[align.near_supervised(first, xp=np)]
            arrays["last_channel"] = features.channel_scales(last, config.store.last_dtype)
        if distributed.is_leader():
            writer.commit_tables(arrays)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tables of the store")


def padded_rows(rows: Batch, numbers: range, size: int) -> Batch:
    """Rows by number, followed by empty ones up to `size` rows."""
    here = slice(numbers.start, numbers.start + len(numbers))
    return Batch(*(np.pad(np.asarray(array[here]), ((0, size - len(numbers)), (0, 0))) for array in rows))
