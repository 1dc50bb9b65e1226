"""Which part of a target gives numbers that are not finite: a slow second pass, for when a first one has met some."""

import bisect
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.targets.model.features import distributions

_BUCKET = 64  # texts are padded to a multiple of so many tokens, so that few shapes are compiled


def check_finite(graphdef: Any, state: Any, batch: Batch) -> None:
    """Raises UserError where a target's numbers for the tokens of these rows are not finite; it names the first layer.

    Args:
      graphdef, state: of the target. batch: rows on the target's mesh; positions of segment 0 do not count.
    """
    last_finite, logits_finite = map(bool, _ends_finite(graphdef, state, batch))
    if last_finite and logits_finite:
        return
    layers = nnx.merge(graphdef, state).spec.layers
    # What is not finite stays so in the residual stream: the first boundary behind it is found by bisection.
    first = bisect.bisect_left(
        range(layers + 1), True, key=lambda boundary: not bool(_stream_finite(graphdef, state, batch, boundary))
    )
    where = "its embeddings" if first == 0 else f"its layer {first - 1} (counted from 0)"
    if first > layers:
        where = "its lm_head" if last_finite else "its final norm"
    raise broken_target(where)


def check_text_finite(graphdef: Any, state: Any, tokens: np.ndarray) -> None:
    """As `check_finite`, for the token ids [n] of one text."""
    size = -(-len(tokens) // _BUCKET) * _BUCKET
    padded_BT = np.pad(np.asarray(tokens, np.int32), (0, size - len(tokens)))[None]
    real_BT = np.arange(size)[None] < len(tokens)
    check_finite(graphdef, state, Batch(padded_BT, real_BT.astype(np.int32), np.arange(size)[None], real_BT))


def broken_target(where: str) -> UserError:
    """The sentence for a target of which `where`, or nothing that is known, is the first part that is not finite."""
    return UserError(
        f"The target cannot be used: {where} gives numbers that are not finite (NaN or infinity). Its weights are "
        "damaged, or their type is too narrow: download it again, or compare it with python -m jeagle.doctor --against "
        "transformers."
    )


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _ends_finite(graphdef: Any, state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Whether the states after the final norm, and the logits, are finite."""
    model, padding_BT = nnx.merge(graphdef, state), batch.segments_BT == 0
    _, last_BTH = model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, ())
    last_BTH = jnp.where(padding_BT[..., None], 0, last_BTH)
    lse_BT = distributions(model, last_BTH).lse
    return jnp.isfinite(last_BTH).all(), (jnp.isfinite(lse_BT) | padding_BT).all()


@functools.partial(jax.jit, static_argnames=("graphdef", "boundary"))
def _stream_finite(graphdef: Any, state: Any, batch: Batch, boundary: int) -> jax.Array:
    """Whether the residual stream at a layer boundary is finite."""
    model = nnx.merge(graphdef, state)
    aux_BTAH, _ = model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, (boundary,))
    return (jnp.isfinite(aux_BTAH).all(axis=(2, 3)) | (batch.segments_BT == 0)).all()
