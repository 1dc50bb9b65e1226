"""Filling a store, unit by unit, with features that the target computes or that others have computed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from jeagle import features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.agreement import stored_target_spec
from jeagle.extraction.capture import Capture, Finish
from jeagle.extraction.plan import StorePlan, made_from, padded_rows, plan_store, store_format
from jeagle.interfaces import Batch
from jeagle.run import assemble, dataset
from jeagle.runtime import distributed
from jeagle.runtime.progress import Progress

Producer = Callable[[str, range, Batch], Finish]
"""(split, row numbers, these rows padded to a batch) -> a function that waits for their features, which are begun."""


def extract(config: RunConfig, out: str, prepared: dataset.Prepared | None = None) -> bool:
    """Fills the store at `out` with what the target computes of the run's rows.

    Args:
      prepared: of `dataset.prepare`, where the caller has prepared the rows already.

    Returns:
      Whether anything was missing; otherwise the target has not been loaded.

    Raises:
      UserError: for a store made from something else, or a disk that is full or too small.
    """
    form = store_format(config)
    prepared, mesh = prepared or dataset.prepare(config), assemble.mesh_of(config)
    if not distributed.anywhere(not _is_filled(config, out, prepared)):
        return False
    loaded = assemble.load_target(config, mesh)
    plan = plan_store(config, out, loaded, prepared, mesh)
    capture = Capture(loaded.target, plan.aux_layers, mesh, width=plan.width, form=form, channels=plan.channels)
    fill_store(config, plan, lambda split, numbers, batch: capture.begin(batch), label="extract")
    return True


def _is_filled(config: RunConfig, out: str, prepared: dataset.Prepared) -> bool:
    """Whether a finished store that fits the run lies there. What is wrong with another one, its writer says."""
    try:
        store, files = features.Store(out), targets.resolve(config.target.ref)
        store.check_complete()
        layers = stored_target_spec(store.about, config.target.family).layers
        made = made_from(config, files, targets.check_aux_layers(config.target.aux_layers, layers), prepared)
        features.check_fit(store.storage, made, store.about["made_from"], "")
        features.check_fit(store.storage, store.about["made_from"], made, "")
    except UserError:
        return False
    return True


def fill_store(config: RunConfig, plan: StorePlan, produce: Producer, *, label: str) -> None:
    """Makes the units of a store until none is left; a thread writes one while the next is computed.

    Args:
      label: names the command in the progress line.

    Raises:
      UserError: the disk is full, or the rows of a batch do not divide over the processes.
    """
    writer, share = plan.writer, config.train.batch_rows // jax.process_count()
    if share * jax.process_count() != config.train.batch_rows:
        raise UserError(f"--train.batch-rows must be a multiple of the {jax.process_count()} processes.")
    tokens = {u.name: int(plan.sizes[u.split].tokens[u.rows.start : u.rows.stop].sum()) for u in plan.units}
    done = sum(tokens.values()) - sum(tokens[unit.name] for unit in writer.pending(plan.units))
    chunk = min(max(config.data.row_length // 8, 16), 1024)
    with (
        Progress(sum(tokens.values()), "tokens", label, done=done, shown=distributed.is_leader()) as progress,
        ThreadPoolExecutor(1, "segments") as pool,
    ):
        writing: Future = pool.submit(int)  # nothing yet
        for unit in _units_by_turns(writer, plan.units):
            parts = []
            for count, batch, finish in _batches_one_ahead(plan, unit, share, produce):
                stored = finish()
                if count:  # otherwise this process only takes part in what the others compute
                    parts.append(features.ragged_rows(batch, stored, range(count)))
                    done += sum(parts[-1].lengths)
                writer.claims.renew()
                progress.update(done, written=f"{writer.bytes / 1e9:.2f} GB")
            writing.result()
            if unit is not None:
                writing = pool.submit(writer.commit, unit, features.joined_rows(parts), chunk)
        writing.result()
    if distributed.is_leader():
        writer.finish()


def _units_by_turns(writer: features.Writer, units: list[features.WorkUnit]) -> Iterator[features.WorkUnit | None]:
    """The unit that this process makes next, while each other process of the run makes another one.

    None where fewer units are left than there are processes.
    """
    processes, number_of = jax.process_count(), {unit.name: i for i, unit in enumerate(units)}
    while True:
        taken = writer.take(units, processes) if distributed.is_leader() else []
        numbers = np.full(processes, -1, np.int64)
        numbers[: len(taken)] = [number_of[unit.name] for unit in taken]
        if processes > 1:
            numbers = np.asarray(multihost_utils.broadcast_one_to_all(numbers))
        if (numbers < 0).all():
            return
        own = int(numbers[jax.process_index()])
        yield units[own] if own >= 0 else None


def _batches_one_ahead(
    plan: StorePlan, unit: features.WorkUnit | None, share: int, produce: Producer
) -> Iterator[tuple[int, Batch, Finish]]:
    """(the number of rows, the rows padded to `share`, their features) of a unit, the next batch having begun.

    Every process begins as many batches, because the target computes over all their devices together.
    """
    numbers, split = (unit.rows, unit.split) if unit else (range(0), "train")
    most = len(numbers) if jax.process_count() == 1 else plan.writer.about["layout"]["rows_per_segment"]
    begun: list[tuple[int, Batch, Finish]] = []
    for start in range(0, most, share):
        chosen = numbers[start : start + share]
        batch = padded_rows(plan.rows[split], chosen, share)
        begun.append((len(chosen), batch, produce(split, chosen, batch)))
        if len(begun) > 1:
            yield begun.pop(0)
    yield from begun
