"""How queries, keys and values are mixed: in plain blocks, or, where rows are packed on TPUs, by a kernel."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from jeagle.layers import LANES, Sight, attend, splash
from jeagle.runtime.mesh import platform, row_axes

_HEADS = "tensor"  # the mesh's axis that heads are split over


def mix(
    queries_BTQC: jax.Array,
    keys_BSGC: jax.Array,
    values_BSGE: jax.Array,
    sight: Sight,
    dtype: Any,
    mesh: Mesh | None,
    **switches: Any,
) -> jax.Array:
    """As `layers.attend`, on the mesh that the model lies on; None is one device."""
    arrays = queries_BTQC, keys_BSGC, values_BSGE
    parts = 1 if mesh is None else mesh.shape[_HEADS]
    packed = sight.query_segments_BT is not None and queries_BTQC.shape[1] % LANES == 0
    if platform(mesh) != "tpu" or not packed or keys_BSGC.shape[2] % parts:
        return attend(*arrays, sight, dtype, **switches)
    if mesh is None or mesh.size == 1:
        return splash(*arrays, sight, dtype, **switches)
    rows, heads = row_axes(mesh, len(queries_BTQC)), _HEADS if parts > 1 else None
    return splash(*arrays, sight, dtype, mesh=mesh, row_axes=rows, head_axis=heads, **switches)
