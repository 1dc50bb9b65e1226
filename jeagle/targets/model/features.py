"""Features of a batch: the aux hidden states and the distributions of the target that a draft learns from."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jeagle.align import select, take_rows
from jeagle.interfaces import Batch, Features, TopK
from jeagle.runtime.mesh import by_rows, logical_sharding, platform, row_axes
from jeagle.runtime.xla_workarounds import argmax_by_blocks, top_k_by_blocks
from jeagle.targets.model.decoder import Decoder

# Positions whose logits over the whole vocabulary exist at a time on a device. Accelerators read all of lm_head for
# each chunk, which pays only for many positions.
CPU_CHUNK, ACCELERATOR_CHUNK = 256, 1024


def features(
    model: Decoder,
    batch: Batch,
    aux_layers: tuple[int, ...],
    wanted_BT: Bool[Array, "B T"],
    width: int,
    top_k: int = 0,
) -> Features:
    """Computes the features of packed rows.

    Args:
      wanted_BT: the positions whose logits are needed; everything that follows from logits is 0 at the others.
      width: an upper bound of the number of wanted positions in each row.
      top_k: number of the most likely tokens that teach; 0 = the final hidden states teach.
    """
    aux_BTAH, last_BTH = model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, aux_layers)
    chosen = select(wanted_BT, width)
    rows = jnp.arange(wanted_BT.shape[0])[:, None]

    def scatter(values_BN: jax.Array) -> jax.Array:
        live_BN = chosen.live_BN.reshape(*chosen.live_BN.shape, *(1,) * (values_BN.ndim - 2))
        empty_BT = jnp.zeros((*wanted_BT.shape, *values_BN.shape[2:]), values_BN.dtype)
        return empty_BT.at[rows, chosen.positions_BN].set(jnp.where(live_BN, values_BN, 0))

    summary = jax.tree.map(scatter, distributions(model, take_rows(last_BTH, chosen.positions_BN), top_k))
    return Features(aux_BTAH, last_BTH if summary.top is None else summary.top, summary.greedy, summary.lse)


class DistributionSummary(NamedTuple):
    """Summary of the target's distributions at N positions of each row.

    Attributes:
      greedy: argmax of the logits, int32 [B, N]. lse: their logsumexp, float32 [B, N].
      top: the most likely tokens; None if they were not asked for.
    """

    greedy: jax.Array
    lse: jax.Array
    top: TopK | None


def distributions(model: Any, last_BNH: Float[Array, "B N H"], top_k: int = 0) -> DistributionSummary:
    """Summarises the target's distributions over its whole vocabulary.

    Args:
      model: as for `over_vocabulary`.
      last_BNH: hidden states after the final norm.
      top_k: number of the most likely tokens to return; 0 = none.
    """

    def top(logits: jax.Array) -> tuple[jax.Array, TopK | None]:
        lse = jax.nn.logsumexp(logits, axis=-1)
        if not top_k:
            return lse, None
        values, ids = top_k_by_blocks(logits, top_k)
        log_probs = values - lse[..., None]
        rest = jnp.maximum(1.0 - jnp.exp(log_probs).sum(axis=-1), 0.0)
        return lse, TopK(ids.astype(jnp.int32), log_probs, rest)

    greedy_BN, (lse_BN, top_BN) = over_vocabulary(model, last_BNH, top)
    return DistributionSummary(greedy_BN, lse_BN, top_BN)


def over_vocabulary(
    model: Any, last_BNH: Float[Array, "B N H"], reduce: Callable[[jax.Array], Any]
) -> tuple[Int[Array, "B N"], Any]:
    """argmax and `reduce` of the logits of each position, a chunk of positions at a time.

    Args:
      model: a `Decoder`, or without a mesh any object with its method `logits`.
      reduce: logits [B, n, V] -> array [B, n, ...] or a tree of such arrays.
    """
    batch, width, hidden = last_BNH.shape
    mesh = getattr(model, "mesh", None)
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in row_axes(mesh, batch))
    at_once = parts * (CPU_CHUNK if platform(mesh) == "cpu" else ACCELERATOR_CHUNK)
    chunk = -(-width // min(width, max(1, -(-batch * width // at_once))))  # positions of each row, which stays in place
    chunks = -(-width // chunk)
    padded = jnp.pad(last_BNH, ((0, 0), (0, chunks * chunk - width), (0, 0)))
    to_logits = model.logits
    if mesh is not None:
        head = model.head_rows()
        if mesh.size > 1:  # gathered once for all chunks, except for the split of the vocabulary
            sharding = NamedSharding(mesh, logical_sharding(("vocab", None), head.shape, mesh))
            head = jax.lax.with_sharding_constraint(head.astype(model.dtype), sharding)
        to_logits = functools.partial(model.logits, head=head)

    def one_chunk(last: jax.Array) -> tuple[jax.Array, Any]:
        logits = to_logits(by_rows(last, mesh))
        return argmax_by_blocks(logits).astype(jnp.int32), reduce(logits)

    def joined(values: jax.Array) -> jax.Array:
        return jnp.moveaxis(values, 0, 1).reshape(batch, chunks * chunk, *values.shape[3:])[:, :width]

    by_chunk = jnp.moveaxis(padded.reshape(batch, chunks, chunk, hidden), 1, 0)
    return jax.tree.map(joined, jax.lax.map(one_chunk, by_chunk))
