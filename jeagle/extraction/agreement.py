"""Whether a store agrees with itself and, where the target's weights are on this machine, with the target."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jeagle import align, features, targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.extraction.capture import Capture
from jeagle.interfaces import LogitShape, Tables, TopK
from jeagle.run import assemble
from jeagle.runtime import distributed
from jeagle.runtime.mesh import logical_sharding, replicated
from jeagle.targets import TargetFiles, TargetSpec

# The limits, by the type that the store has.
_LEAST_ARGMAX = {"bfloat16": 0.99, "float32": 0.99, "fp8": 0.85, "int8": 0.9}  # share of equal argmaxes
_MOST_ERROR = {"bfloat16": 0.02, "float32": 0.02, "fp8": 0.1, "int8": 0.1}  # relative, of hidden states
_ANEW = "Make the store anew with this target, or give --target.ref the one that it was made with."
_TIE = 4.0  # standard deviations that rounding may move the difference of two logits
_SAMPLED = 64  # positions at which a store is checked against itself
_MOST_MOVED = 0.05  # probability mass of a truncated teacher that may lie on other tokens than the target's


def check_stores(
    config: RunConfig, stores: features.StoreSet, mesh: Mesh, loaded: assemble.LoadedTarget | None, *, compare: bool
) -> None:
    """Checks each store against itself and, where the target's weights are on this machine, against the target.

    Args:
      loaded: the target, where it is in memory already.
      compare: whether to compare with the target at all.

    Raises:
      UserError: for a store that contradicts itself or the target.
    """
    for store in stores.members:
        made = store.about["made_from"]
        if not any(store.present(split) for split in features.SPLITS):
            continue  # none of it will be read
        spec = stored_target_spec(store.about, made["target"]["family"])
        share = check_stored_argmax(store, stored_tables(store, np.arange(spec.vocab), mesh), spec.logits)
        what = "the likeliest stored tokens are" if store.format.top_k else "stored states give"
        line = f"features: {store}: {what} the stored argmax at {share:.1%} of sampled positions"
        if compare and config.store.check_rows and store.present("train"):
            try:
                if loaded is None and local_target_files(config.target.ref):
                    loaded = assemble.load_target(config, mesh)
            except UserError as error:
                line += f"; it was not compared with the target ({error})"
            if loaded is not None:
                agreement = compare_with_target(store, "train", config.store.check_rows, loaded.target, mesh)
                line += f"; the target's argmax is the stored one at {agreement.argmax:.1%} of {agreement.positions}"
        if distributed.is_leader():
            print(line, flush=True)


def evenly_spaced(numbers: list[int], count: int) -> list[int]:
    """`count` of these numbers, evenly apart, with repetitions where there are fewer."""
    return [numbers[int(i)] for i in np.linspace(0, len(numbers) - 1, count)]


def local_target_files(reference: str) -> TargetFiles | None:
    """The target's files where `reference` is a local path with weights; None otherwise. Nothing is downloaded."""
    if not reference or not Path(reference).expanduser().exists():
        return None
    try:
        return targets.resolve(reference)
    except UserError:
        return None  # a folder with a tokenizer and no weights


def stored_target_spec(about: dict[str, Any], family: str) -> TargetSpec:
    """The target's spec, from the configuration in store.json.

    Args:
      family: --target.family, the description of a model of the user's own; empty for the one of its architecture.
    """
    return targets.read_spec(about["target_config"], targets.own_family(family))


def stored_tables(store: features.Store, draft_to_target_D: Int[np.ndarray, " D"], mesh: Mesh) -> Tables:
    """The frozen rows in a store, embedding [V, H] and head [D, H], on the mesh; a process reads those of its devices.

    Args:
      draft_to_target_D: the token id of each entry of the draft vocabulary.
    """
    vocab, width = store.table_shape("embed")

    def on_mesh(name: str, rows: np.ndarray | None) -> jax.Array:
        shape = (vocab if rows is None else len(rows), width)
        sharding = NamedSharding(mesh, logical_sharding(("vocab", "width"), shape, mesh))

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if rows is None:
                return store.table(name, index)
            return store.table(name, (slice(None), index[1]))[rows[index[0]]]

        return jax.make_array_from_callback(shape, sharding, read)

    head = "head" if store.table_shape("head") else "embed"  # absent where the target ties them
    ids = jax.device_put(np.asarray(draft_to_target_D, np.int32), replicated(mesh))
    return Tables(on_mesh("embed", None), on_mesh(head, np.asarray(draft_to_target_D)), ids)


class Agreement(NamedTuple):
    """How a store's rows compare with the target's.

    Attributes:
      positions: how many were compared.
      argmax: the share of positions whose stored argmax is the target's, or so near that rounding chooses between them.
      aux_error: |stored - target| / |target| of the aux hidden states: the median over positions of the worst layer.
      moved: the probability mass that a truncated teacher gives to tokens beyond what the target gives them, the mean
        over positions; 0 where hidden states are stored.
    """

    positions: int
    argmax: float
    aux_error: float
    moved: float = 0.0


def compare_with_target(store: features.Store, split: str, count: int, target: targets.Target, mesh: Mesh) -> Agreement:
    """Computes some rows with the target and compares them with the stored ones.

    Args:
      count: rows, evenly spaced over those that are finished; rounded up to a multiple of this process's devices.

    Raises:
      UserError: where they differ by more than their types explain, or no row of the split is finished.
    """
    if not (present := store.present(split)):
        raise UserError(f"The store {store} has no {split} rows.")
    devices = jax.local_device_count()
    rows = evenly_spaced(present, -(-count // devices) * devices)
    form = features.StoreFormat(top_k=store.format.top_k)
    capture = Capture(target, tuple(store.about["made_from"]["taps"]), mesh, width=store.row_length, form=form)
    batch = store.batch(split, rows)
    stored, computed = jax.jit(features.decode_features)(store.stored(split, rows, batch)), capture(batch)
    near_BT, real_BT = align.near_supervised(batch, xp=np), batch.segments_BT > 0
    greedy_N, teacher = np.asarray(stored.greedy_BT)[near_BT], jax.tree.map(lambda x: x[near_BT], computed.teacher)
    same = greedy_N == computed.greedy_BT[near_BT]
    if isinstance(teacher, TopK):
        probs_NP = np.exp(np.asarray(teacher.log_probs_BTP, np.float32))
        own_N = np.where(teacher.ids_BTP == greedy_N[:, None], probs_NP, 0.0).sum(axis=1)
        same |= probs_NP.max(axis=1) - own_N <= _MOST_MOVED
    else:
        head_VH, error = target.model().head_rows(), _MOST_ERROR[store.format.last]
        same |= np.asarray(near_ties(teacher.values, head_VH, greedy_N, computed.greedy_BT[near_BT], error))
    aux, expected = np.asarray(stored.aux_BTAH)[real_BT], np.asarray(computed.aux.values)[real_BT]
    error_NA = np.linalg.norm(aux - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-9)
    agreement = Agreement(
        int(near_BT.sum()),
        float(same.mean()) if same.size else 1.0,
        float(np.median(error_NA, 0).max()) if len(error_NA) else 0.0,
        _moved_mass(stored.teacher, computed.teacher, near_BT),
    )
    check_agreement(agreement, str(store), store.format.aux)
    return agreement


@jax.jit
def near_ties(
    x_NH: Float[Array, "N H"],
    head_VH: Float[Array, "V H"],
    one_N: Int[Array, " N"],
    other_N: Int[Array, " N"],
    error: Float[Array, ""] | float,
) -> Bool[Array, " N"]:
    """Whether rounding can choose between two tokens: their logits differ by no more than it may move them apart.

    Rounding points anywhere, so that it moves the difference of two logits by a normal deviate whose standard deviation
    is error * |x| * |w_one - w_other| / sqrt(H). A large vocabulary of a flat target has many such pairs.

    Args:
      x_NH: the hidden states that lm_head reads. error: the relative error of these.
    """
    apart_NH = (head_VH[one_N] - head_VH[other_N]).astype(jnp.float32)
    spread_N = jnp.linalg.norm(apart_NH, axis=-1) * jnp.linalg.norm(x_NH, axis=-1) / jnp.sqrt(x_NH.shape[-1])
    return jnp.abs((x_NH * apart_NH).sum(axis=-1)) <= _TIE * error * spread_N


def _moved_mass(stored: Any, computed: Any, near_BT: np.ndarray) -> float:
    if not isinstance(stored, TopK) or not near_BT.any():
        return 0.0
    (ids, probs), (target_ids, target_probs) = (
        (np.asarray(x.ids_BTP)[near_BT], np.exp(np.asarray(x.log_probs_BTP, np.float32)[near_BT]))
        for x in (stored, computed)
    )
    moved, probs_V = [], np.zeros(max(ids.max(), target_ids.max()) + 1, np.float32)
    for n in range(len(ids)):
        probs_V[target_ids[n]] = target_probs[n]
        moved.append(np.maximum(probs[n] - probs_V[ids[n]], 0.0).sum())
        probs_V[target_ids[n]] = 0.0
    return float(np.mean(moved))


def check_agreement(agreement: Agreement, store: str, kind: str) -> None:
    """Raises UserError unless a store agrees with the target as closely as its types allow.

    Args:
      store: its name in the message.
      kind: the type of its aux hidden states.
    """
    most = _MOST_ERROR[kind]
    if not (agreement.argmax >= 0.99 and agreement.aux_error <= most):  # NaN is neither
        raise UserError(
            f"The store {store} does not contain this target's features: of {agreement.positions} positions the "
            f"target's argmax is the stored one at {agreement.argmax:.1%}, and the aux hidden states are off by "
            f"{agreement.aux_error:.1%} ({most:.0%} is allowed for {kind}). {_ANEW}"
        )
    if not agreement.moved <= _MOST_MOVED:
        raise UserError(
            f"The store {store} does not contain this target's distributions: {agreement.moved:.1%} of their mass lies "
            f"elsewhere, over {agreement.positions} positions ({_MOST_MOVED:.0%} is allowed). {_ANEW}"
        )


def check_stored_argmax(store: features.Store, tables: Tables, logits: LogitShape) -> float:
    """The share of positions at which the stored last hidden state, put through the stored head, has the stored argmax,
    or one that rounding could have made it.

    This shows, without the target, a hidden state that was taken before the final norm or after another layer. Of a
    truncated teacher it is the share at which the likeliest token is the argmax and the probabilities sum to 1.

    Args:
      tables: with the target's whole vocabulary.

    Raises:
      UserError: for a share that is too low for the type of the teacher.
    """
    split = next(s for s in features.SPLITS if store.present(s))
    numbers = sorted({*evenly_spaced(store.present(split), 4)})
    batch = store.batch(split, numbers)
    stored = jax.jit(features.decode_features)(store.stored(split, numbers, batch))
    near = np.argwhere(align.near_supervised(batch, xp=np))
    if not len(near):
        return 1.0  # rows without any supervised token
    near = near[np.unique(np.linspace(0, len(near) - 1, _SAMPLED).astype(int))]
    teacher, greedy = jax.tree.map(lambda x: np.asarray(x)[near[:, 0], near[:, 1]], (stored.teacher, stored.greedy_BT))
    if isinstance(teacher, TopK):
        mass = np.exp(teacher.log_probs_BTP).sum(axis=-1) + teacher.rest_BT
        argmax, least = np.where(np.abs(mass - 1) < _MOST_MOVED, teacher.ids_BTP[:, 0], -1), 1.0
        reason = "Its distributions are damaged."
    else:
        compute = jax.jit(lambda x, head: jnp.argmax(logits(x @ head.astype(jnp.float32).T), -1))
        argmax, least = np.asarray(compute(teacher, tables.head_DH)), _LEAST_ARGMAX[store.format.last] - 1.5 / len(near)
        tied = near_ties(teacher, tables.head_DH, greedy, argmax, _MOST_ERROR[store.format.last])
        argmax = np.where(tied, greedy, argmax)
        reason = "It may contain hidden states from before the final norm, or of another layer."
    share = float((argmax == greedy).mean())
    if share < least:
        raise UserError(
            f"The store {store} contradicts itself: its teacher gives its own argmax at only {share:.1%} of "
            f"{len(near)} positions. {reason}"
        )
    return share
