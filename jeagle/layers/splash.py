"""Attention of packed rows on TPUs by JAX's splash kernel, which never writes scores to memory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jeagle.layers.attention import LANES, AttentionMask

BLOCK = 512  # queries and keys; the scores of a block take 1 MB of a TPU core's own memory


def packed_attention(
    queries_BTQC: Float[Array, "B T Q C"],
    keys_BTGC: Float[Array, "B T G C"],
    values_BTGE: Float[Array, "B T G E"],
    mask: AttentionMask,
    dtype: Any,
    *,
    mesh: Mesh | None = None,
    row_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
    window: int = 0,
    chunk: int = 0,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    sinks_Q: Float[Array, " Q"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T Q E"]:
    """Computes `masked_attention` of packed rows; each device runs the kernel on its own rows and heads.

    Args:
      mesh: the devices; rows are split over its axes `row_axes`, heads over its axis `head_axis`. None = one device.
      window, chunk, scale, soft_cap, sinks_Q: as for `masked_attention`. T must be a multiple of `LANES`.
      interpret: run the kernel in Python, on any platform.

    Source: jax.experimental.pallas.ops.tpu.splash_attention; FlashAttention-2 (arXiv 2307.08691).
    """
    length, heads, width = queries_BTQC.shape[1:]
    scaled = (queries_BTQC * (scale or 1 / math.sqrt(width))).astype(dtype)
    segments = mask.query_segments_BT
    assert segments is not None
    if chunk:  # a chunk of a document becomes a document of its own
        segments = segments * (length // chunk + 1) + mask.queries_BT // chunk
    run = _kernel(length, heads // (mesh.shape[head_axis] if mesh and head_axis else 1), window, soft_cap, interpret)

    def on_device(queries, keys, values, segments, sinks):
        def one_row(queries, keys, values, segments):
            ids = kernel.SegmentIds(q=segments, kv=segments)
            by_head = (x.swapaxes(0, 1) for x in (queries, keys, values))
            return run(*by_head, segment_ids=ids, sinks=sinks).swapaxes(0, 1)

        return jax.vmap(one_row)(queries, keys, values, segments)

    if mesh is not None and mesh.size > 1:
        rows = row_axes or None
        by_heads = PartitionSpec(rows, None, head_axis)
        on_device = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(by_heads, by_heads, by_heads, PartitionSpec(rows), PartitionSpec(head_axis)),
            out_specs=by_heads,
            check_vma=False,
        )
    sinks = None if sinks_Q is None else sinks_Q.astype(jnp.float32)
    out = on_device(scaled, keys_BTGC.astype(dtype), values_BTGE.astype(dtype), segments, sinks)
    return out.astype(jnp.promote_types(dtype, jnp.float32))


@functools.lru_cache
def _kernel(length: int, heads: int, window: int, soft_cap: float, interpret: bool) -> Any:
    """The kernel for one row; positions rise by one within a document, so that a window of them is one of slots."""
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
