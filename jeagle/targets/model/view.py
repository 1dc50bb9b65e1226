"""What every mixer over time reads and keeps.

A mixer reads x [B, T, H] and a `View`; it returns its output, what it keeps for later tokens (None without a cache),
and the keys and values that it attended to, which Gemma's later layers may read again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jeagle.layers import Sight
from jeagle.runtime.mesh import logical_sharding

Axes = tuple[str | None, ...]


class Cache(NamedTuple):
    """Rotated keys and values of a layer, [B, S, G, C] each; of latent attention the latents [B, S, 1, .] and the
    shared rotated keys. Stacked layers have a leading axis."""

    keys: jax.Array
    values: jax.Array

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Logical axes of each array, a leading stack axis left out."""
        return (("rows", None, "heads", None),) * 2


class View(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      positions_BT: within each document. segments_BT: of packed rows; None with a cache.
      sight: who sees whom, over cached keys where there is a cache.
      lengths_BT: of each token's document, or None where no rope asks.
      count_B: with a cache: how many tokens of each row are real; the rest are padding.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    sight: Sight
    lengths_BT: jax.Array | None = None
    count_B: jax.Array | None = None


def stored(kept: Cache, fresh: Cache, positions_BT: jax.Array) -> Cache:
    """`kept` with fresh keys and values written at their positions."""
    rows = jnp.arange(positions_BT.shape[0])[:, None]
    return Cache(*(old.at[rows, positions_BT].set(new.astype(old.dtype)) for old, new in zip(kept, fresh, strict=True)))


def cache_shardings(caches: Any, mesh: Mesh) -> Any:
    """How caches lie on the mesh: rows over the copies of the model, heads where the model's own heads are."""

    def lay(array: Any, axes: Axes) -> NamedSharding:
        lead = (None,) * (array.ndim - len(axes))
        return NamedSharding(mesh, logical_sharding(lead + axes, array.shape, mesh))

    return tuple(None if kept is None else type(kept)(*map(lay, kept, kept.axes)) for kept in caches)
