"""The target's features of rows, as a store keeps them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jeagle import align, features, targets
from jeagle.errors import UserError
from jeagle.interfaces import Batch, TopK
from jeagle.runtime.mesh import row_sharding
from jeagle.targets import Target

_WHOLE = features.Form()


class Captured(NamedTuple):
    """Stored features of some rows, and whether each row's are finite."""

    stored: features.Stored
    finite_B: Any


@functools.partial(jax.jit, static_argnames=("graphdef", "aux_layers", "width", "form", "mesh"))
def _captured(
    graphdef: Any,
    state: Any,
    batch: Batch,
    channels: dict[str, jax.Array],
    aux_layers: tuple[int, ...],
    width: int,
    form: features.Form,
    mesh: Mesh,
) -> Captured:
    model = nnx.merge(graphdef, state)
    found = targets.features(model, batch, aux_layers, align.near_supervised(batch), width, form.top_k)
    real_BT = batch.segments_BT > 0
    taught = found.teacher.log_probs_BTP if isinstance(found.teacher, TopK) else found.teacher
    finite = jnp.isfinite(found.aux_BTAH).all(axis=(2, 3)) & jnp.isfinite(taught).all(axis=2)
    captured = Captured(features.encode(found, form, channels), (finite | ~real_BT).all(axis=1))
    # Each process finds its own rows, and only those, on its own devices.
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, row_sharding(mesh)), captured)


class Capture:
    """The frozen target as a function from rows to what is stored of them.

    Args:
      width: the most positions of a row whose teacher is kept.
      form: of what is stored.
      channels: scales of narrow kinds; None for those of no scale at all.
    """

    def __init__(
        self,
        target: Target,
        aux_layers: tuple[int, ...],
        mesh: Mesh,
        *,
        width: int,
        form: features.Form = _WHOLE,
        channels: dict[str, np.ndarray] | None = None,
    ):
        self._target, self._aux_layers, self._mesh, self._width, self._form = target, aux_layers, mesh, width, form
        shapes = {"taps": (len(aux_layers), target.spec.width), "last": (target.spec.width,)}
        one: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        self._channels = one | (channels or {})

    def begin(self, rows: Batch) -> Captured:
        """This process's rows -> the global batch's features, on the devices and perhaps still under way."""
        sharding = row_sharding(self._mesh)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)
        target, channels = self._target, self._channels
        return _captured(
            target.graphdef, target.state, batch, channels, self._aux_layers, self._width, self._form, self._mesh
        )

    def end(self, captured: Captured) -> features.Stored:
        """This process's rows of what `begin` gave, on the host. UserError for features that are not numbers."""
        own = jax.tree.map(_own_rows, captured)
        if not own.finite_B.all():
            raise UserError(
                f"The target's hidden states of row {int(np.argmin(own.finite_B))} of a batch are not numbers: its "
                "weights are damaged, or too narrow; compare them with python -m jeagle.doctor --against transformers."
            )
        return own.stored

    def __call__(self, rows: Batch) -> features.Stored:
        return self.end(self.begin(rows))


def _own_rows(array: jax.Array) -> np.ndarray:
    """The rows of a global array split by rows that this process's devices hold, in order, once each."""
    if array.is_fully_addressable:
        return np.asarray(array)
    pieces = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    return np.concatenate([pieces[start] for start in sorted(pieces)])


def kept_width(rows: Batch, block: int = 1024) -> int:
    """The most positions of any row whose teacher is kept, a multiple of 16."""
    most = 0
    for start in range(0, len(rows.tokens_BT), block):
        part = Batch(*(np.asarray(array[start : start + block]) for array in rows))
        most = max(most, int(align.near_supervised(part, xp=np).sum(axis=1).max(initial=0)))
    return min(-(-max(most, 1) // 16) * 16, rows.tokens_BT.shape[1])
