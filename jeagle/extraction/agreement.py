"""Whether a store says what its target says: against the target where its weights are at hand, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jeagle import align, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture
from jeagle.interfaces import LogitShape, Tables, TopK
from jeagle.run import assemble
from jeagle.runtime import distributed
from jeagle.runtime.mesh import logical_sharding, replicated
from jeagle.targets import TargetFiles, TargetSpec

_LEAST_AGREE = {"bfloat16": 0.99, "float32": 0.99, "fp8": 0.85, "int8": 0.9}  # of argmaxes, by how `last` is kept
_MOST_MOVED = 0.05  # mass that may lie elsewhere in what is kept of a distribution
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
        given = "the likeliest stored tokens are" if store.form.top_k else "stored states give"
        said = f"features: {store}: {given} the stored argmax at {agree:.1%} of sampled positions"
        if config.store.check_rows and (loaded or at_hand(config.target.ref)) and store.present("train"):
            said += f"; {_recomputed(config, store, mesh, loaded)}"
        if distributed.is_leader():
            print(said, flush=True)


def _recomputed(config: RunConfig, store: features.Store, mesh: Mesh, loaded: assemble.LoadedTarget | None) -> str:
    try:
        loaded = loaded or assemble.load_target(config, mesh)
    except UserError as error:
        return f"not compared with the target ({error})"
    count = -(-config.store.check_rows // jax.local_device_count()) * jax.local_device_count()
    rows = _spread(store.present("train"), count)
    found = compare(store, "train", rows, fresh_capture(store, loaded.target, mesh))
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
      moved: mass that a truncated teacher gives to tokens beyond what the target gives them, the mean over positions;
        0 where states are kept.
    """

    positions: int
    argmax: float
    aux_error: float
    moved: float = 0.0


def fresh_capture(store: features.Store, target: targets.Target, mesh: Mesh) -> Capture:
    """The target as `compare` needs it for this store."""
    form = features.Form(top_k=store.form.top_k)
    return Capture(target, tuple(store.about["made_from"]["taps"]), mesh, width=store.row_length, form=form)


def compare(store: features.Store, split: str, rows: list[int], capture: Capture) -> Agreement:
    """Recomputes rows with the target.

    Args:
      capture: from `fresh_capture`.
    """
    batch = store.batch(split, rows)
    kept = jax.jit(features.decode)(store.stored(split, rows, batch))
    fresh = capture(batch)
    _, seen_BT, near_BT = store.places(batch)
    same = np.asarray(kept.greedy_BT)[near_BT] == fresh.greedy_BT[near_BT]
    aux, own = np.asarray(kept.aux_BTAH)[seen_BT], np.asarray(fresh.aux.values)[seen_BT]
    off_NA = np.linalg.norm(aux - own, axis=-1) / np.maximum(np.linalg.norm(own, axis=-1), 1e-9)
    off = float(np.median(off_NA, 0).max()) if len(off_NA) else 0.0
    return Agreement(int(near_BT.sum()), _mean(same, 1.0), off, _moved(kept.teacher, fresh.teacher, near_BT))


def _moved(kept: Any, fresh: Any, near_BT: np.ndarray) -> float:
    if not isinstance(kept, TopK):
        return 0.0
    (ids, ours), (own_ids, theirs) = (
        (np.asarray(x.ids_BTP)[near_BT], np.exp(np.asarray(x.log_probs_BTP, np.float32)[near_BT]))
        for x in (kept, fresh)
    )
    probs_V = np.zeros(max(ids.max(initial=0), own_ids.max(initial=0)) + 1, np.float32)
    moved = np.zeros(len(ids))
    for n in range(len(ids)):
        probs_V[own_ids[n]] = theirs[n]
        moved[n] = np.maximum(ours[n] - probs_V[ids[n]], 0.0).sum()
        probs_V[own_ids[n]] = 0.0
    return _mean(moved, 0.0)


def _mean(values: np.ndarray, without: float) -> float:
    return float(values.mean()) if values.size else without


def check_agreement(store: features.Store, found: Agreement) -> None:
    """UserError unless the store says what the target says, as closely as its types let it."""
    kinds = store.about["made_from"]["arrays"]
    if not (found.argmax >= 0.99 and found.aux_error <= _MOST_OFF[kinds["taps"]]):  # NaN is neither
        raise UserError(
            f"The store {store} does not hold this target's features: of {found.positions} positions the target's "
            f"argmax is the stored one at {found.argmax:.1%}, and taps are off by {found.aux_error:.1%} "
            f"({_MOST_OFF[kinds['taps']]:.0%} allowed for {kinds['taps']}). Extract anew."
        )
    if not found.moved <= _MOST_MOVED:
        raise UserError(
            f"The store {store} does not hold this target's distributions: {found.moved:.1%} of their mass lies "
            f"elsewhere, over {found.positions} positions ({_MOST_MOVED:.0%} allowed). Extract anew."
        )


def check_teacher(store: features.Store, tables: Tables, logits: LogitShape, positions: int = 64) -> float:
    """Share of positions at which the stored `last`, put through the stored head, has the stored argmax.

    A state taken before the final norm, or of another layer, shows here without a target. Of a truncated teacher, the
    share at which the likeliest token is the argmax, and all probabilities are a distribution.

    Args:
      tables: with the target's whole vocabulary.

    Raises:
      UserError: for a share that is too low for how the teacher is kept.
    """
    split = next(s for s in ("train", "held_out") if store.present(s))
    numbers = sorted({*_spread(store.present(split), 4)})
    batch = store.batch(split, numbers)
    kept = jax.jit(features.decode)(store.stored(split, numbers, batch))
    near = np.argwhere(align.near_supervised(batch, xp=np))
    if not len(near):
        return 1.0  # rows in which nothing is learnt
    near = near[np.unique(np.linspace(0, len(near) - 1, positions).astype(int))]
    teacher, greedy = jax.tree.map(lambda x: np.asarray(x)[near[:, 0], near[:, 1]], (kept.teacher, kept.greedy_BT))
    if isinstance(teacher, TopK):
        mass = np.exp(teacher.log_probs_BTP).sum(axis=-1) + teacher.rest_BT
        says, least = np.where(np.abs(mass - 1) < _MOST_MOVED, teacher.ids_BTP[:, 0], -1), 1.0
        reason = "Its distributions are damaged."
    else:
        argmax = jax.jit(lambda x, head: jnp.argmax(logits(x @ head.astype(jnp.float32).T), -1))
        says, least = np.asarray(argmax(teacher, tables.head_DH)), _LEAST_AGREE[store.form.last] - 1.5 / len(near)
        reason = "It may hold states from before the final norm, or of another layer."
    agree = float((says == greedy).mean())
    if agree < least:
        raise UserError(
            f"The store {store} contradicts itself: what teaches gives its own argmax at only {agree:.1%} of "
            f"{len(near)} positions. {reason}"
        )
    return agree
