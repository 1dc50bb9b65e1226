"""Hidden states that other trainers wrote, into a store, once they have been compared with the target."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import data, exchange, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.exchange import PeerFeatures
from jeagle.extraction.capture import Capture, unit_channels
from jeagle.extraction.fill import Finish, fill_store
from jeagle.extraction.plan import plan_store, store_format
from jeagle.interfaces import Batch, Features
from jeagle.run import assemble, dataset
from jeagle.run.claim import check_folder, new_rows
from jeagle.runtime.manifest import fingerprint

_COMPARED = 2  # samples that are compared with the target
_MOST_DISTANT = 0.1  # relative distance up to which hidden states count as those of the same layer

SamplesOfRows = list[list[int]]  # the numbers of the samples in each row


def import_peer_features(config: RunConfig, source: Path, out: str) -> None:
    """Writes the hidden states in the folder `source` into a store at `out`.

    Raises:
      UserError: for files of no known format, hidden states that are not this target's or not of these layers, or a
        disk without room.
    """
    form = store_format(config)
    check_folder(config)
    features.check_storage(features.Storage(out))
    peers, mesh = exchange.open_peer_features(source), assemble.mesh_of(config)
    loaded = assemble.load_target(config, mesh)
    spec = loaded.target.spec
    aux_layers = targets.check_aux_layers(config.target.aux_layers, spec.layers)
    every_layer = tuple(range(spec.layers + 1))
    check_layers(peers, aux_layers, Capture(loaded.target, every_layer, mesh, width=config.data.row_length))
    samples = _pack_samples(config, peers)
    prepared = _write_rows(config, peers, source, loaded, samples)
    plan = plan_store(config, out, loaded, prepared, mesh, imported=peers.format)
    channels = unit_channels(len(aux_layers), spec.width) | plan.channels

    @jax.jit
    def encode(state: Any, aux_BTAH: jax.Array, last_BTH: jax.Array) -> features.StoredFeatures:
        model = nnx.merge(loaded.target.graphdef, state)
        last_BTH = last_BTH if peers.normed else model.final_norm(last_BTH)
        distributions = targets.distributions(model, last_BTH, form.top_k)
        teacher = last_BTH if distributions.top is None else distributions.top
        computed = Features(aux_BTAH, teacher, distributions.greedy, distributions.lse.astype(jnp.float32))
        return features.encode_features(computed, form, channels)

    def produce(split: str, numbers: range, batch: Batch) -> Finish:
        read = [[peers.read(i) for i in samples[split][n]] for n in numbers]

        def padded(name: str) -> np.ndarray:
            rows = [np.concatenate([getattr(s, name)[: config.data.row_length] for s in row]) for row in read]
            out_BTX = np.zeros((*batch.tokens_BT.shape, *rows[0].shape[1:]), np.float32)
            for b, row in enumerate(rows):
                out_BTX[b, : len(row)] = row
            return out_BTX

        encoded = encode(loaded.target.state, padded("aux"), padded("last"))
        return lambda: jax.tree.map(np.asarray, encoded)

    fill_store(config, plan, produce, label="import")


def check_layers(peers: PeerFeatures, aux_layers: tuple[int, ...], capture: Capture) -> None:
    """Raises UserError unless the first samples have the target's hidden states after the layers that the run asks for.

    Args:
      capture: of the hidden states after every number of layers, from 0 (the embeddings) to L.
    """
    devices = jax.device_count()
    for number in range(min(_COMPARED, len(peers.files))):
        sample, path = peers.read(number), peers.files[number]
        tokens = np.tile(sample.tokens, (devices, 1))
        positions = np.tile(np.arange(len(sample.tokens), dtype=np.int32), (devices, 1))
        batch = Batch(tokens, np.ones_like(tokens), positions, np.tile(sample.supervised, (devices, 1)))
        own_TLH = np.asarray(capture(batch).aux.values[0], np.float32)
        nearest = []
        for states_TH in np.moveaxis(sample.aux, 1, 0).astype(np.float32):
            norm_T1 = np.linalg.norm(states_TH, axis=-1)[:, None] + 1e-9
            distance_L = np.median(np.linalg.norm(own_TLH - states_TH[:, None], axis=-1) / norm_T1, axis=0)
            best = int(distance_L.argmin())
            if not distance_L[best] <= _MOST_DISTANT:  # NaN is not
                raise UserError(
                    f"{path} contains hidden states of no layer of this target (the nearest, after {best} layers, "
                    f"differs by {distance_L[best]:.0%}): give the target that they were made with, in the same "
                    "weights."
                )
            nearest.append(best)
        if tuple(nearest) != aux_layers:
            raise UserError(
                f"{path} contains the target's hidden states after {', '.join(map(str, nearest))} layers, and this run "
                f"asks for {', '.join(map(str, aux_layers))}: give --target.aux-layers {' '.join(map(str, nearest))} "
                "(other trainers count layers differently)."
            )


def _pack_samples(config: RunConfig, peers: PeerFeatures) -> dict[str, SamplesOfRows]:
    """The numbers of the samples in each row of each split, in their order, with as many in a row as fit."""
    length, count = config.data.row_length, len(peers.files)
    first_held_out = count - round(config.data.held_out * count)
    samples: dict[str, SamplesOfRows] = {}
    for split, numbers in (("train", range(first_held_out)), ("held_out", range(first_held_out, count))):
        samples[split], free = [], 0
        for number in numbers:
            needed = min(len(peers.read(number).tokens), length)
            if needed > free:
                samples[split].append([])
                free = length
            samples[split][-1].append(number)
            free -= needed
    return samples


def _write_rows(
    config: RunConfig,
    peers: PeerFeatures,
    source: Path,
    loaded: assemble.LoadedTarget,
    samples: dict[str, SamplesOfRows],
) -> dataset.Prepared:
    """Writes the rows that the samples make into the run's folder."""
    length, statistics = config.data.row_length, {}
    files = [(str(f.relative_to(source)), f.stat().st_size) for f in peers.files]
    made = dataset.made_from(config, loaded.tokenizer, targets.open_weights(loaded.files).config, [])
    made["source"] = fingerprint([peers.format, files])

    def row(numbers: list[int]) -> Batch:
        read = [peers.read(i) for i in numbers]
        return data.rows_of([[data.Rendered(s.tokens[:length], s.supervised[:length]) for s in read]], length)

    with new_rows(config, made) as aside:
        for split, rows in samples.items():
            statistics[split] = dataset.write_split(aside / split, map(row, rows), length, made["target_vocab"])
        loaded.tokenizer.backend_tokenizer.save(str(aside / "tokenizer.json"))
        (aside / "held_out.jsonl").write_text("")
        dataset.write_rows_manifest(aside, config, made, statistics)
    return dataset.Prepared(config.folder / "data", config.folder / "tables", statistics)
