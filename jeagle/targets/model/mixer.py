"""What every mixer over time is built with, what it reads, and what it returns.

A mixer (attention, latent attention or the gated delta rule) is called with x [B, T, H], a `TokenContext`, its cache
(None without one), and the keys and values that earlier layers share with later ones. It returns its output [B, T, H],
its new cache, and the keys and values that it attended to (None where it has none).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jeagle.layers import LANES, AttentionMask, masked_attention, packed_attention
from jeagle.runtime.mesh import logical_sharding, platform, row_axes

Axes = tuple[str | None, ...]

_HEAD_AXIS = "tensor"  # the mesh axis that heads are split over


class BuildOptions(NamedTuple):
    """Options that every part of a decoder is built with.

    Attributes:
      dtype: type of the operands of matrix products.
      rngs: random numbers for the initial parameters.
      stored: the narrow type that kernels are stored in; None = `dtype`'s own.
      mesh: the devices, for experts and for attention on TPUs; None = one device.
    """

    dtype: Any
    rngs: nnx.Rngs
    stored: Any = None
    mesh: Mesh | None = None


class KVCache(NamedTuple):
    """Rotated keys and values of a layer, each [B, S, G, C]; stacked layers have one more leading axis.

    Latent attention stores its latents [B, S, 1, R] as keys, and the rotated keys that all heads share as values.
    """

    keys: jax.Array
    values: jax.Array

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Logical axes of each array, without the leading axis of a stack."""
        return (("rows", None, "heads", None),) * 2


class TokenContext(NamedTuple):
    """Where the tokens of a call stand, and which keys they may attend to.

    Attributes:
      positions_BT: position of each token within its document.
      segments_BT: document of each token of packed rows; None where there is a cache.
      mask: which keys each query may attend to; the keys are those of the cache where there is one.
      lengths_BT: length of each token's document; None where no rotary embedding depends on it.
      count_B: with a cache, the number of real tokens in each row; the tokens after them are padding.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    mask: AttentionMask
    lengths_BT: jax.Array | None = None
    count_B: jax.Array | None = None


def write_cache(cache: KVCache, fresh: KVCache, positions_BT: Int[Array, "B T"]) -> KVCache:
    """Returns `cache` with the fresh keys and values [B, T, G, C] written at their positions."""
    rows = jnp.arange(positions_BT.shape[0])[:, None]
    return KVCache(
        *(old.at[rows, positions_BT].set(new.astype(old.dtype)) for old, new in zip(cache, fresh, strict=True))
    )


def cache_shardings(caches: Any, mesh: Mesh) -> Any:
    """Shardings of caches: rows are split as batches are, heads as the model's own heads are."""

    def sharding(array: Any, axes: Axes) -> NamedSharding:
        stack = (None,) * (array.ndim - len(axes))
        return NamedSharding(mesh, logical_sharding(stack + axes, array.shape, mesh))

    return tuple(None if cache is None else type(cache)(*map(sharding, cache, cache.axes)) for cache in caches)


def attend_on_mesh(
    queries_BTQC: Float[Array, "B T Q C"],
    keys_BSGC: Float[Array, "B S G C"],
    values_BSGE: Float[Array, "B S G E"],
    mask: AttentionMask,
    dtype: Any,
    mesh: Mesh | None,
    **options: Any,
) -> Float[Array, "B T Q E"]:
    """Computes `layers.masked_attention`; packed rows on TPUs go through the splash kernel instead.

    Args:
      mesh: the devices that the model lies on; None = one device.
      options: the keyword arguments of `layers.masked_attention`.
    """
    arrays = queries_BTQC, keys_BSGC, values_BSGE
    head_shards = 1 if mesh is None else mesh.shape[_HEAD_AXIS]
    packed = mask.query_segments_BT is not None and queries_BTQC.shape[1] % LANES == 0
    if platform(mesh) != "tpu" or not packed or keys_BSGC.shape[2] % head_shards:
        return masked_attention(*arrays, mask, dtype, **options)
    if mesh is not None and mesh.size > 1:
        options["row_axes"] = row_axes(mesh, len(queries_BTQC))
        options["head_axis"] = _HEAD_AXIS if head_shards > 1 else None
    return packed_attention(*arrays, mask, dtype, mesh=mesh, **options)
