"""Attention of packed rows on TPUs, by the splash kernel that JAX brings: no scores are ever written to memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from jeagle.layers.mask import Sight

LANES = 128  # lengths are multiples of it
BLOCK = 512  # of queries and keys: scores of a block are 1 MB, in a TPU core's own memory


def splash(
    queries_BTQC: jax.Array,
    keys_BTGC: jax.Array,
    values_BTGE: jax.Array,
    sight: Sight,
    dtype: Any,
    *,
    mesh: Mesh | None = None,
    row_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
    window: int = 0,
    chunk: int = 0,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    sinks_Q: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attend`, of packed rows; each device runs the kernel on its own rows and heads.

    Args:
      mesh: of the devices; rows are split over `row_axes` of it, heads over `head_axis`.
      interpret: run the kernel in Python, on any platform.

    Source: jax.experimental.pallas.ops.tpu.splash_attention; FlashAttention-2 (arXiv 2307.08691).
    """
    length, heads, width = queries_BTQC.shape[1:]
    scaled = (queries_BTQC * (scale or 1 / math.sqrt(width))).astype(dtype)
    segments = _segments(sight, chunk, length)
    run = _kernel(length, heads // (mesh.shape[head_axis] if mesh and head_axis else 1), window, soft_cap, interpret)

    def local(queries, keys, values, segments, sinks):
        def row(queries, keys, values, segments):
            ids = kernel.SegmentIds(q=segments, kv=segments)
            by_head = (x.swapaxes(0, 1) for x in (queries, keys, values))
            return run(*by_head, segment_ids=ids, sinks=sinks).swapaxes(0, 1)

        return jax.vmap(row)(queries, keys, values, segments)

    given = scaled, keys_BTGC.astype(dtype), values_BTGE.astype(dtype), segments
    sinks = None if sinks_Q is None else sinks_Q.astype(jnp.float32)
    if mesh is not None and mesh.size > 1:
        rows = row_axes or None
        by_heads = PartitionSpec(rows, None, head_axis)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(by_heads, by_heads, by_heads, PartitionSpec(rows), PartitionSpec(head_axis)),
            out_specs=by_heads,
            check_vma=False,
        )
    return local(*given, sinks).astype(jnp.promote_types(dtype, jnp.float32))


def _segments(sight: Sight, chunk: int, length: int) -> jax.Array:
    """Documents [B, T], or chunks of documents: queries see keys of their own alone."""
    segments = sight.query_segments_BT
    assert segments is not None
    return segments if not chunk else segments * (length // chunk + 1) + sight.queries_BT // chunk


@functools.lru_cache
def _kernel(length: int, heads: int, window: int, soft_cap: float, interpret: bool) -> Any:
    """The kernel for one row. A window of positions is one of places: positions rise by one within a document."""
    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    block = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=soft_cap or None,
            interpret=interpret,
        )
