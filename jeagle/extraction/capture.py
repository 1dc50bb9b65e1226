"""The target as a function from rows to the features that a store contains of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from jeagle import align, features, targets
from jeagle.interfaces import Batch, TopK
from jeagle.runtime.mesh import row_sharding
from jeagle.targets import Target

_EXACT = features.StoreFormat()


Finish = Callable[[], features.StoredFeatures]
"""Waits for features whose computation has begun, and returns those of this process's rows, on the host."""


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
) -> tuple[features.StoredFeatures, Bool[Array, " B"]]:
    """Stored features of rows, and whether those of each row are finite."""
    model = nnx.merge(graphdef, state)
    computed = targets.features(model, batch, aux_layers, align.near_supervised(batch), width, form.top_k)
    real_BT = batch.segments_BT > 0
    teacher = computed.teacher.log_probs_BTP if isinstance(computed.teacher, TopK) else computed.teacher
    finite_BT = jnp.isfinite(computed.aux_BTAH).all(axis=(2, 3)) & jnp.isfinite(teacher).all(axis=2)
    captured = features.encode_features(computed, form, channels), (finite_BT | ~real_BT).all(axis=1)
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
        scales = unit_channels(len(aux_layers), target.spec.width) | (channels or {})
        settings = {"channels": scales, "aux_layers": aux_layers, "width": width, "form": form, "mesh": mesh}
        self._target = target.graphdef, target.state
        self._compute, self._mesh = functools.partial(_captured, target.graphdef, target.state, **settings), mesh

    def begin(self, rows: Batch) -> Finish:
        """Begins to compute the features of the global batch, whose rows of this process are given.

        The function that it returns raises UserError for features that are not finite.
        """
        sharding = row_sharding(self._mesh)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)
        captured = self._compute(batch)

        def finish() -> features.StoredFeatures:
            stored, finite_B = jax.tree.map(_own_rows, captured)
            if not finite_B.all():
                if jax.process_count() == 1:  # other processes may not have met it
                    targets.check_finite(*self._target, batch)
                raise targets.broken_target("one of its layers")
            return stored

        return finish

    def __call__(self, rows: Batch) -> features.StoredFeatures:
        return self.begin(rows)()


def unit_channels(aux_layers: int, hidden: int) -> dict[str, np.ndarray]:
    """Scales of channels that change nothing, "taps" [A, H] and "last" [H]."""
    return {"taps": np.ones((aux_layers, hidden), np.float32), "last": np.ones(hidden, np.float32)}


def _own_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array split by rows that this process's devices hold, in order, once each."""
    if array.is_fully_addressable:
        return np.asarray(array)
    pieces = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    return np.concatenate([pieces[start] for start in sorted(pieces)])
