"""Whether a store says what its target says: against the target where its weights are at hand, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jeagle import align, assemble, features, targets
from jeagle.capture import Capture
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.joints import LogitShape, Tables
from jeagle.runtime import distributed
from jeagle.runtime.mesh import logical_sharding, replicated
from jeagle.targets import TargetFiles, TargetSpec

_LEAST_AGREE = {"bfloat16": 0.99, "float32": 0.99, "fp8": 0.85, "int8": 0.9}  # of argmaxes, by how `last` is kept
_MOST_OFF = {"bfloat16": 0.02, "float32": 0.02, "fp8": 0.1, "int8": 0.1}  # relative error of taps, by how they are kept


def recheck(
    config: RunConfig, mixture: features.Mixture, mesh: Mesh, loaded: assemble.LoadedTarget | None = None
) -> None:
    """Whether each store agrees with itself, and, where the target's weights are at hand, with the target.

    Args:
      loaded: the target, where it is in memory already.

    Raises:
      UserError: for a store that does not.
    """
    for store in mixture.stores:
        made = store.about["made_from"]
        if not any(store.present(split) for split in ("train", "held_out")):
            continue  # nothing of it will be read
        spec = spec_of(store.about, made["target"]["family"])
        tables = stored_tables(store, np.arange(spec.vocab), mesh)
        agree = check_teacher(store, tables, spec.logits)
        said = f"features: {store}: stored states give the stored argmax at {agree:.1%} of sampled positions"
        if config.store.check_rows and (loaded or at_hand(config.target.ref)) and store.present("train"):
            said += f"; {_recomputed(config, store, mesh, loaded)}"
        if distributed.is_leader():
            print(said, flush=True)


def _recomputed(config: RunConfig, store: features.Store, mesh: Mesh, loaded: assemble.LoadedTarget | None) -> str:
    try:
        loaded = loaded or assemble.load_target(config, mesh)
    except UserError as error:
        return f"not compared with the target ({error})"
    taps = tuple(store.about["made_from"]["taps"])
    count = -(-config.store.check_rows // jax.local_device_count()) * jax.local_device_count()
    rows = _spread(store.present("train"), count)
    found = compare(store, "train", rows, Capture(loaded.target, taps, mesh, width=store.row_length))
    check_agreement(store, found)
    return f"the target's argmax is the stored one at {found.argmax:.1%} of {found.positions}"


def _spread(rows: list[int], count: int) -> list[int]:
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, count)]


def at_hand(reference: str) -> TargetFiles | None:
    """The target's files where its weights lie in a local path; nothing is downloaded."""
    if not reference or not Path(reference).expanduser().exists():
        return None
    try:
        return targets.resolve(reference)
    except UserError:
        return None  # a folder with a tokenizer and no weights


def spec_of(about: dict[str, Any], family: str) -> TargetSpec:
    """The target's spec from the configuration that the store keeps."""
    return targets.read_spec(about["target_config"], targets.own_family(family) if family else None)


def stored_tables(store: features.Store, draft_to_target_D: np.ndarray, mesh: Mesh) -> Tables:
    """The frozen rows of a store, each process reading those of its own devices."""
    vocab, width = store.shape("embed")

    def laid_out(name: str, rows: np.ndarray | None) -> jax.Array:
        shape = (vocab if rows is None else len(rows), width)
        place = NamedSharding(mesh, logical_sharding(("vocab", "width"), shape, mesh))

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if rows is None:
                return store.part(name, index)
            return store.part(name, (slice(None), index[1]))[rows[index[0]]]

        return jax.make_array_from_callback(shape, place, read)

    head = "head" if store.shape("head") else "embed"  # absent where the target ties them
    ids = jax.device_put(np.asarray(draft_to_target_D, np.int32), replicated(mesh))
    return Tables(laid_out("embed", None), laid_out(head, np.asarray(draft_to_target_D)), ids)


class Agreement(NamedTuple):
    """How a store's rows compare with the target's.

    Attributes:
      positions: compared. argmax: share of positions whose stored argmax is the target's.
      taps_off: |stored - target| over |target|, the median over positions and the worst tap.
    """

    positions: int
    argmax: float
    taps_off: float


def compare(store: features.Store, split: str, rows: list[int], capture: Capture) -> Agreement:
    """Recomputes rows with the target.

    Args:
      capture: of the target, with whole kinds.
    """
    batch = store.batch(split, rows)
    kept = jax.jit(features.decode)(store.stored(split, rows, batch))
    fresh = capture(batch)
    real_BT, near_BT = batch.segments_BT > 0, align.near_supervised(batch, xp=np)
    same = np.asarray(kept.greedy_BT)[near_BT] == fresh.greedy_BT[near_BT]
    taps, own = np.asarray(kept.taps_BTAH)[real_BT], np.asarray(fresh.taps.values)[real_BT]
    off_NA = np.linalg.norm(taps - own, axis=-1) / np.maximum(np.linalg.norm(own, axis=-1), 1e-9)
    return Agreement(int(near_BT.sum()), float(same.mean()) if same.size else 1.0, float(np.median(off_NA, 0).max()))


def check_agreement(store: features.Store, found: Agreement) -> None:
    """UserError unless the store says what the target says, as closely as its types let it."""
    kinds = store.about["made_from"]["arrays"]
    if found.argmax < 0.99 or found.taps_off > _MOST_OFF[kinds["taps"]]:
        raise UserError(
            f"The store {store} does not hold this target's features: of {found.positions} positions the target's "
            f"argmax is the stored one at {found.argmax:.1%}, and taps are off by {found.taps_off:.1%} "
            f"({_MOST_OFF[kinds['taps']]:.0%} allowed for {kinds['taps']}). Extract anew."
        )


def check_teacher(store: features.Store, tables: Tables, logits: LogitShape, positions: int = 64) -> float:
    """Share of positions at which the stored `last`, put through the stored head, has the stored argmax.

    A state taken before the final norm, or of another layer, shows here without a target.

    Args:
      tables: with the target's whole vocabulary.

    Raises:
      UserError: for a share that is too low for how `last` is kept.
    """
    split = next(s for s in ("train", "held_out") if store.present(s))
    numbers = sorted({*_spread(store.present(split), 4)})
    batch = store.batch(split, numbers)
    kept = jax.jit(features.decode)(store.stored(split, numbers, batch))
    near = np.argwhere(align.near_supervised(batch, xp=np))
    near = near[np.unique(np.linspace(0, len(near) - 1, positions).astype(int))]
    last = np.asarray(kept.last_BTH)[near[:, 0], near[:, 1]]
    says = jax.jit(lambda x, head: jnp.argmax(logits(x @ head.astype(jnp.float32).T), -1))(last, tables.head_DH)
    agree = float((np.asarray(says) == np.asarray(kept.greedy_BT)[near[:, 0], near[:, 1]]).mean())
    kind = store.about["made_from"]["arrays"]["last"]
    if agree < _LEAST_AGREE[kind] - 1.5 / len(near):
        raise UserError(
            f"The store {store} contradicts itself: its last states give its own argmax at only {agree:.1%} of "
            f"{len(near)} positions. It may hold states from before the final norm, or of another layer."
        )
    return agree
