"""Filling a store with what the target says of a run's rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jeagle import data, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture, kept_width
from jeagle.extraction.plan import Sizes, about, block, check_space, commit_tables, copy_data, form_of, measure
from jeagle.interfaces import Batch
from jeagle.run import assemble, dataset
from jeagle.runtime import distributed
from jeagle.runtime.progress import Progress


def extract(config: RunConfig, out: str) -> str:
    """Fills the store at `out`; returns where it lies.

    Raises:
      UserError: for a store made from something else, or a disk that is full or too small.
    """
    form = form_of(config)
    features.check_place(features.Place(out))
    prepared, mesh = dataset.prepare(config), assemble.mesh_of(config)
    loaded = assemble.load_target(config, mesh)
    rows = {split: data.load_rows(prepared.data / split) for split in ("train", "held_out")}
    sizes = {split: measure(batch, form) for split, batch in rows.items()}
    aux_layers = targets.check_aux_layers(config.target.aux_layers, loaded.target.spec.layers)
    place = features.Place(out)
    writer = features.Writer(place, about(config, loaded, prepared, sizes, aux_layers, form))
    units = features.units_of({s: len(x.tokens) for s, x in sizes.items()}, writer.about["layout"]["rows_per_segment"])
    check_space(place, writer.pending(units), sizes, loaded.target.spec.width, len(aux_layers), form)
    copy_data(prepared, place)
    width = max(kept_width(batch) for batch in rows.values())
    channels = commit_tables(
        config, writer, loaded, Capture(loaded.target, aux_layers, mesh, width=width), rows["train"]
    )
    capture = Capture(loaded.target, aux_layers, mesh, width=width, form=form, channels=channels)
    _fill(config, writer, units, rows, sizes, capture)
    if distributed.is_leader():
        writer.finish()
    return out


def _fill(
    config: RunConfig,
    writer: features.Writer,
    units: list[features.Unit],
    rows: dict[str, Batch],
    sizes: dict[str, Sizes],
    capture: Capture,
) -> None:
    """Makes units until none is left; one is written on a thread while the next is computed."""
    share = config.train.batch_rows // jax.process_count()
    if share * jax.process_count() != config.train.batch_rows:
        raise UserError(f"--train.batch-rows must be a multiple of the {jax.process_count()} processes.")
    tokens = {unit.name: int(sizes[unit.split].tokens[unit.rows.start : unit.rows.stop].sum()) for unit in units}
    done = sum(tokens.values()) - sum(tokens[unit.name] for unit in writer.pending(units))
    chunk = min(max(config.data.row_length // 8, 16), 1024)
    shown = distributed.is_leader()
    with (
        Progress(sum(tokens.values()), "tokens", "extract", done=done, shown=shown) as progress,
        ThreadPoolExecutor(1, "segments") as pool,
    ):
        writing: Future | None = None
        for unit in _rounds(writer, units):
            parts = []
            for place, found, batch in _captured(
                unit, rows, share, capture, writer.about["layout"]["rows_per_segment"]
            ):
                if len(place):  # else this process only keeps the others company
                    parts.append(features.ragged(batch, found, range(len(place)), aux_at=config.store.aux_at))
                    done += sum(parts[-1].lengths)
                writer.claims.renew()
                progress.update(done, written=f"{writer.bytes / 1e9:.2f} GB")
            if writing is not None:
                writing.result()
            if unit is not None:
                writing = pool.submit(writer.commit, unit, features.joined(parts), chunk)
        if writing is not None:
            writing.result()


def _rounds(writer: features.Writer, units: list[features.Unit]) -> Iterator[features.Unit | None]:
    """The unit that this process makes next, at the same time as each other process of the run makes another; None
    where there are fewer units than processes."""
    processes, by_name = jax.process_count(), {unit.name: i for i, unit in enumerate(units)}
    while True:
        taken = writer.take(units, processes) if distributed.is_leader() else []
        numbers = np.full(processes, -1, np.int64)
        numbers[: len(taken)] = [by_name[unit.name] for unit in taken]
        if processes > 1:
            numbers = np.asarray(multihost_utils.broadcast_one_to_all(numbers))
        if (numbers < 0).all():
            return
        own = int(numbers[jax.process_index()])
        yield units[own] if own >= 0 else None


def _captured(
    unit: features.Unit | None, rows: dict[str, Batch], share: int, capture: Capture, most: int
) -> Iterator[tuple[range, features.Stored, Batch]]:
    """(row numbers, their features, the rows) of a unit, a batch at a time, the next one already under way."""
    numbers = unit.rows if unit else range(0)
    source = rows[unit.split] if unit else rows["train"]
    steps = -(-(len(numbers) if jax.process_count() == 1 else most) // share)
    waiting: list[tuple[range, Any, Batch]] = []
    for step in range(steps):
        chosen = numbers[step * share : (step + 1) * share]
        batch = block(source, chosen, share)
        waiting.append((chosen, capture.begin(batch), batch))
        if len(waiting) > 1:
            chosen, found, batch = waiting.pop(0)
            yield chosen, capture.end(found), batch
    for chosen, found, batch in waiting:
        yield chosen, capture.end(found), batch
