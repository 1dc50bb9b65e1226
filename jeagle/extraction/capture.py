"""The target as a function from rows to the features that a store contains of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from jeagle import align, features, targets
from jeagle.errors import UserError
from jeagle.interfaces import Batch, TopK
from jeagle.runtime.mesh import row_sharding
from jeagle.targets import Target

_EXACT = features.StoreFormat()


class Captured(NamedTuple):
    """Stored features of some rows, and whether those of each row are finite."""

    stored: features.StoredFeatures
    finite_B: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("graphdef", "aux_layers", "width", "form", "mesh"))
def _captured(
    graphdef: Any,
    state: Any,
    batch: Batch,
    channels: dict[str, jax.Array],
    aux_layers: tuple[int, ...],
    width: int,
    form: features.StoreFormat,
    mesh: Mesh,
) -> Captured:
    model = nnx.merge(graphdef, state)
    computed = targets.features(model, batch, aux_layers, align.near_supervised(batch), width, form.top_k)
    real_BT = batch.segments_BT > 0
    teacher = computed.teacher.log_probs_BTP if isinstance(computed.teacher, TopK) else computed.teacher
    finite_BT = jnp.isfinite(computed.aux_BTAH).all(axis=(2, 3)) & jnp.isfinite(teacher).all(axis=2)
    captured = Captured(features.encode_features(computed, form, channels), (finite_BT | ~real_BT).all(axis=1))
    # Each process reads its own rows, and only those, from its own devices.
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, row_sharding(mesh)), captured)


class Capture:
    """The frozen target as a function from rows to what a store contains of them.

    Args:
      aux_layers: layer boundaries whose hidden states are taken, ascending.
      width: the most positions of a row whose teacher is stored.
      form: the format of the store.
      channels: the scales of channels of the types of one byte; None for float types.
    """

    def __init__(
        self,
        target: Target,
        aux_layers: tuple[int, ...],
        mesh: Mesh,
        *,
        width: int,
        form: features.StoreFormat = _EXACT,
        channels: dict[str, np.ndarray] | None = None,
    ):
        self._target, self._aux_layers, self._mesh, self._width, self._form = target, aux_layers, mesh, width, form
        self._channels: dict[str, Any] = unit_channels(len(aux_layers), target.spec.width) | (channels or {})

    def begin(self, rows: Batch) -> Captured:
        """Begins to compute the features of the global batch, whose rows of this process are given."""
        sharding = row_sharding(self._mesh)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)
        target, channels = self._target, self._channels
        return _captured(
            target.graphdef, target.state, batch, channels, self._aux_layers, self._width, self._form, self._mesh
        )

    def end(self, captured: Captured) -> features.StoredFeatures:
        """Waits for what `begin` returned; this process's rows on the host.

        Raises:
          UserError: for features that are not finite.
        """
        own = jax.tree.map(_own_rows, captured)
        if not own.finite_B.all():
            raise UserError(
                f"The target's hidden states of row {int(np.argmin(own.finite_B))} of a batch are not finite numbers: "
                "its weights are damaged, or their type is too narrow. Compare them with python -m jeagle.doctor "
                "--against transformers."
            )
        return own.stored

    def __call__(self, rows: Batch) -> features.StoredFeatures:
        return self.end(self.begin(rows))


def unit_channels(aux_layers: int, hidden: int) -> dict[str, np.ndarray]:
    """Scales of channels that change nothing, "taps" [A, H] and "last" [H]."""
    return {"taps": np.ones((aux_layers, hidden), np.float32), "last": np.ones(hidden, np.float32)}


def _own_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array split by rows that this process's devices hold, in order, once each."""
    if array.is_fully_addressable:
        return np.asarray(array)
    pieces = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    return np.concatenate([pieces[start] for start in sorted(pieces)])
