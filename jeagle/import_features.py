"""Others' hidden states into a store: converters/from_speculators.py or from_specforge.py --source DIR --out STORE.

The target is needed: for its embedding and head, and to check that the states are its own, taken after the layers that
--target.aux-layers says. The files are read without running code.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import data, exchange, features, targets
from jeagle import flags as configs
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.exchange import PeerFeatures, Sample
from jeagle.extraction.capture import Capture, kept_width
from jeagle.extraction.plan import about, block, check_space, commit_tables, copy_data, form_of, measure
from jeagle.interfaces import Batch, Features
from jeagle.run import assemble, dataset
from jeagle.run.claim import check_folder, new_rows
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import fingerprint
from jeagle.runtime.progress import Progress

_CHECKED = 2  # samples that are compared with the target
_FAR = 0.1  # relative distance of states that are not the same layer's

Rows = list[list[int]]  # which samples each row holds


def main(arguments: list[str]) -> None:
    """The command of both converters."""
    given: dict[str, str] = {}
    rest = list(arguments)
    for name in ("--source", "--out"):
        if name in rest[:-1]:
            place = rest.index(name)
            given[name] = rest[place + 1]
            del rest[place : place + 2]
    program = "from_speculators.py --source DIR --out STORE"
    config = configs.from_command_line(rest, program=program, description=__doc__)
    if len(given) < 2:
        raise UserError("Give --source, the folder of the files, and --out, the store to write.")
    prepare_host()
    adopt(config, Path(given["--source"]), given["--out"])
    print(f"train from it: python -m jeagle.train --config ... --name {config.name} --features {given['--out']}")


def adopt(config: RunConfig, source: Path, out: str) -> None:
    """Writes what `source` holds into a store at `out`.

    Raises:
      UserError: for files of no known form, states that are not this target's or not of these layers, or no room.
    """
    form = form_of(config)
    check_folder(config)
    features.check_place(features.Place(out))
    peers, mesh = exchange.open_peer_features(source), assemble.mesh_of(config)
    loaded = assemble.load_target(config, mesh)
    spec = loaded.target.spec
    aux_layers = targets.check_aux_layers(config.target.aux_layers, spec.layers)
    check_layers(
        peers, aux_layers, Capture(loaded.target, tuple(range(spec.layers + 1)), mesh, width=config.data.row_length)
    )
    prepared, plan = _prepare(config, peers, source, loaded)
    rows = {split: data.load_rows(prepared.data / split) for split in plan}
    sizes = {split: measure(batch, form) for split, batch in rows.items()}
    place = features.Place(out)
    writer = features.Writer(place, about(config, loaded, prepared, sizes, aux_layers, form))
    units = features.units_of({s: len(x.tokens) for s, x in sizes.items()}, writer.about["layout"]["rows_per_segment"])
    check_space(place, writer.pending(units), sizes, spec.width, len(aux_layers), form)
    copy_data(prepared, place)
    whole = Capture(loaded.target, aux_layers, mesh, width=max(kept_width(batch) for batch in rows.values()))
    channels = commit_tables(config, writer, loaded, whole, rows["train"])
    ones = {"taps": np.ones((len(aux_layers), spec.width), np.float32), "last": np.ones(spec.width, np.float32)}
    encode = functools.partial(
        _encoded,
        loaded.target.graphdef,
        loaded.target.state,
        normed=peers.normed,
        form=form,
        channels=ones | channels,
    )
    _fill(config, writer, units, peers, plan, rows, encode, form)


def _fill(
    config: RunConfig,
    writer: features.Writer,
    units: list[features.Unit],
    peers: PeerFeatures,
    plan: dict[str, Rows],
    rows: dict[str, Batch],
    encode: Any,
    form: features.Form,
) -> None:
    """Reads and writes units until none is left."""
    size, length, done = config.train.batch_rows, config.data.row_length, 0
    with Progress(sum(len(p) for p in plan.values()), "rows", "adopt") as progress:
        while taken := writer.take(units):
            unit, parts = taken[0], []
            for start in range(unit.rows.start, unit.rows.stop, size):
                numbers = range(start, min(start + size, unit.rows.stop))
                batch = block(rows[unit.split], numbers, size)
                states = _states(peers, [plan[unit.split][n] for n in numbers], batch)
                found = jax.tree.map(np.asarray, encode(*states))
                parts.append(features.ragged(batch, found, range(len(numbers)), aux_at=form.aux_at))
                done += len(numbers)
                progress.update(done)
            writer.commit(unit, features.joined(parts), min(max(length // 8, 16), 1024))
    writer.finish()


def check_layers(peers: PeerFeatures, aux_layers: tuple[int, ...], capture: Capture) -> None:
    """UserError unless the taps of the first samples are the target's streams after the layers that the run asks for.

    Args:
      capture: of every layer's stream, 0 (the embeddings) to L.
    """
    devices = jax.device_count()
    for number in range(min(_CHECKED, len(peers.files))):
        sample = peers.read(number)
        tokens = np.tile(sample.tokens, (devices, 1))
        positions = np.tile(np.arange(len(sample.tokens), dtype=np.int32), (devices, 1))
        batch = Batch(tokens, np.ones_like(tokens), positions, np.tile(sample.supervised, (devices, 1)))
        own = np.asarray(capture(batch).aux.values[0], np.float32)
        found = tuple(
            _nearest(own, sample.aux[:, a].astype(np.float32), peers.files[number]) for a in range(sample.aux.shape[1])
        )
        if found != aux_layers:
            flag = " ".join(map(str, found))
            raise UserError(
                f"{peers.files[number]} holds the target's streams after {', '.join(map(str, found))} layers, and this "
                f"run asks for {', '.join(map(str, aux_layers))}: give --target.aux-layers {flag} (peers count layers "
                "otherwise)."
            )


def _nearest(own_TLH: np.ndarray, states_TH: np.ndarray, path: Path) -> int:
    """The layer boundary whose stream these states are. UserError where they are none's."""
    size = np.linalg.norm(states_TH, axis=-1)[:, None] + 1e-9
    off_L = np.median(np.linalg.norm(own_TLH - states_TH[:, None], axis=-1) / size, axis=0)
    best = int(off_L.argmin())
    if not off_L[best] <= _FAR:
        raise UserError(
            f"{path} holds states that are no layer's of this target (the nearest, after {best} layers, is off by "
            f"{off_L[best]:.0%}): give the target that they were made with, in the same weights."
        )
    return best


def _prepare(
    config: RunConfig, peers: PeerFeatures, source: Path, loaded: assemble.LoadedTarget
) -> tuple[dataset.Prepared, dict[str, Rows]]:
    """The rows that the samples make, in the run's folder: samples in their order, as many in a row as fit."""
    length, count = config.data.row_length, len(peers.files)
    sizes = [min(len(peers.read(i).tokens), length) for i in range(count)]
    cut = count - round(config.data.held_out * count)
    plan = {"train": _packed(sizes, range(cut), length), "held_out": _packed(sizes, range(cut, count), length)}
    files = [(str(f.relative_to(source)), f.stat().st_size) for f in peers.files]
    made = dataset.made_from(config, loaded.tokenizer, targets.open_weights(loaded.files).config, [])
    made["source"] = fingerprint([peers.format, files])
    folder = config.folder / "data"
    with new_rows(config) as aside:
        statistics: dict[str, Any] = {}
        for split, rows in plan.items():
            counts = np.zeros(made["target_vocab"], np.int64)
            with data.RowWriter(aside / split, length) as writer:
                for row in rows:
                    batch = data.rows_of([[_document(peers.read(i), length) for i in row]], length)
                    counts += data.count_tokens(batch, len(counts))
                    writer.write(batch)
            np.save(aside / split / "counts.npy", counts)
            statistics[split] = {"rows": len(rows), "supervised_tokens": int(counts.sum())}
        loaded.tokenizer.backend_tokenizer.save(str(aside / "tokenizer.json"))
        (aside / "held_out.jsonl").write_text("")
        dataset.write_rows_manifest(aside, config, made, statistics)
    return dataset.Prepared(folder, config.folder / "tables", statistics), plan


def _document(sample: Sample, length: int) -> data.Rendered:
    return data.Rendered(sample.tokens[:length], sample.supervised[:length])


def _packed(sizes: list[int], numbers: range, length: int) -> Rows:
    """Samples by row, in order."""
    rows: Rows = []
    room = 0
    for number in numbers:
        if sizes[number] > room:
            rows.append([])
            room = length
        rows[-1].append(number)
        room -= sizes[number]
    return rows


def _states(peers: PeerFeatures, rows: Rows, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The rows' taps [B, T, A, H] and last [B, T, H], float32, zero on padding."""
    size, length = batch.tokens_BT.shape
    read = [[peers.read(i) for i in row] for row in rows]
    aux_BTAH = np.zeros((size, length, *read[0][0].aux.shape[1:]), np.float32)
    last_BTH = np.zeros((size, length, *read[0][0].last.shape[1:]), np.float32)
    for b, samples in enumerate(read):
        starts = itertools.accumulate([min(len(s.tokens), length) for s in samples], initial=0)
        for start, sample in zip(starts, samples, strict=False):
            here = slice(start, start + min(len(sample.tokens), length))
            count = here.stop - here.start
            aux_BTAH[b, here], last_BTH[b, here] = sample.aux[:count], sample.last[:count]
    return aux_BTAH, last_BTH


@functools.partial(jax.jit, static_argnames=("graphdef", "normed", "form"))
def _encoded(
    graphdef: Any,
    state: Any,
    aux: jax.Array,
    last: jax.Array,
    *,
    normed: bool,
    form: features.Form,
    channels: Any,
) -> features.Stored:
    model = nnx.merge(graphdef, state)
    last = last if normed else model.final_norm(last)
    said = targets.distributions(model, last, form.top_k)
    found = Features(aux, last if said.top is None else said.top, said.greedy, said.lse.astype(jnp.float32))
    return features.encode(found, form, channels)
