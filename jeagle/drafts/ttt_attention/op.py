"""The op: attention to step-0 keys by one of the backends, merged with the slot's own keys; and its backward pass.

The backward pass of a softmax over a union of keys needs only the union's output and logsumexp: with them each part's
weights are made anew, and its gradients taken by itself. So what is kept is the output and its logsumexp, and a backend
does no more than the step-0 keys, forward and backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jeagle.drafts.remat import ATTENTION, marked
from jeagle.drafts.ttt_attention import chunked, gpu, tpu
from jeagle.drafts.ttt_attention.mirror import Mirror
from jeagle.drafts.ttt_attention.past import MASKED, Past

M = TypeVar("M", Mirror, None)
Backend = Literal["chunked", "tpu", "tpu_interpreted", "gpu", "gpu_interpreted"]
# What takes a platform's step-0 keys, where one device holds all heads of a row.
BY_PLATFORM: dict[str, Backend] = {"cpu": "chunked", "tpu": "tpu", "gpu": "gpu"}


class Kernels(NamedTuple):
    """Of a backend: both passes, as `Past` says, and whether so many slots and positions suit them."""

    forward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    divides: Callable[[int, int], bool]

    @classmethod
    def interpreted(cls, room: ModuleType) -> Kernels:
        forward, backward = (functools.partial(one, interpret=True) for one in (room.forward, room.backward))
        return cls(forward, backward, room.divides)


BACKENDS: dict[Backend, Kernels] = {
    "chunked": Kernels(chunked.forward, chunked.backward, lambda slots, length: True),
    "tpu": Kernels(tpu.forward, tpu.backward, tpu.divides),
    "tpu_interpreted": Kernels.interpreted(tpu),
    "gpu": Kernels(gpu.forward, gpu.backward, gpu.divides),
    "gpu_interpreted": Kernels.interpreted(gpu),
}


class Inputs(NamedTuple):
    """As in `reference.reference`."""

    queries_BQNC: jax.Array
    keys_BGTC: jax.Array
    values_BGTC: jax.Array
    first_BN: jax.Array
    last_BN: jax.Array
    own_keys_JBGNC: jax.Array
    own_values_JBGNC: jax.Array
    own_allowed_J: jax.Array


class Static(NamedTuple):
    dtype: Any
    backend: Backend


def attend(
    queries_BQNC: jax.Array,
    keys_BGTC: jax.Array,
    values_BGTC: jax.Array,
    first_BN: jax.Array,
    last_BN: jax.Array,
    own_keys_JBGNC: jax.Array,
    own_values_JBGNC: jax.Array,
    own_allowed_J: jax.Array,
    *,
    dtype: Any,
    mirror: M,
    backend: Backend = "chunked",
) -> tuple[jax.Array, M]:
    """As `reference.reference`; `last_BN` must rise along each row, each slot at another position.

    Args:
      dtype: of the matrix products and of the result; sums are float32 or better.
      mirror: what brings the own keys and values along in the backward pass (see `mirror`); where None, they are kept.
      backend: of the step-0 keys. Where slots or positions do not divide into a kernel's blocks, "chunked" is taken.

    Returns:
      [B, Q, N, C], and the mirror for the next step.

    Source: for the backward pass, FlashAttention-2 (arXiv 2307.08691), section 3.1.
    """
    inputs = Inputs(
        queries_BQNC, keys_BGTC, values_BGTC, first_BN, last_BN, own_keys_JBGNC, own_values_JBGNC, own_allowed_J
    )
    if not BACKENDS[backend].divides(queries_BQNC.shape[2], keys_BGTC.shape[2]):
        backend = "chunked"
    return _attention(Static(jnp.dtype(dtype), backend), inputs, mirror)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, mirror: Mirror | None) -> tuple[jax.Array, Mirror | None]:
    return _forward(static, inputs, mirror)[0]


def _forward(static: Static, inputs: Inputs, mirror: Mirror | None) -> tuple[tuple[jax.Array, Mirror | None], Any]:
    past = _past(static, inputs)
    mixed, top, total = BACKENDS[static.backend].forward(past)
    if inputs.own_allowed_J.size:
        own = _own_scores(inputs, past.queries_BGRNC)
        joint = jnp.maximum(top, own.max(axis=0))
        scale, own = jnp.exp(top - joint), jnp.exp(own - joint)
        total = total * scale + own.sum(axis=0)
        mixed, top = mixed * scale + _own_sum(own, inputs.own_values_JBGNC), joint
    out = (mixed / total).reshape(inputs.queries_BQNC.shape).astype(static.dtype)
    out, lse = marked(out, ATTENTION), marked(top + jnp.log(total), ATTENTION)
    if mirror is not None:
        inputs = inputs._replace(own_keys_JBGNC=None, own_values_JBGNC=None)
    return (out, mirror), (inputs, out, lse)


def _backward(static: Static, residuals: Any, cotangents: Any) -> tuple[Inputs, Mirror | None]:
    (inputs, out, lse), (dout_BQNC, mirror) = residuals, cotangents
    if mirror is not None:
        inputs = inputs._replace(own_keys_JBGNC=mirror.keys_JBGNC, own_values_JBGNC=mirror.values_JBGNC)
    past = _past(static, inputs)
    queries = past.queries_BGRNC
    dout = dout_BQNC.astype(queries.dtype).reshape(queries.shape)
    # <dout, out>: what the normaliser takes back from the gradient of each weight.
    taken = jnp.sum(dout * out.reshape(dout.shape), axis=-1, keepdims=True)
    dqueries, dkeys, dvalues = BACKENDS[static.backend].backward(past, dout, lse, taken)
    own_weights = jnp.exp(_own_scores(inputs, queries) - lse)
    down = own_weights * (_own_dots(dout, inputs.own_values_JBGNC) - taken)
    dqueries = dqueries + _own_sum(down, inputs.own_keys_JBGNC)
    gradients = (
        dqueries.reshape(dout_BQNC.shape) / math.sqrt(dout.shape[-1]),
        dkeys,
        dvalues,
        None,
        None,
        _own_gradient(down, queries),
        _own_gradient(own_weights, dout),
        None,
    )
    return Inputs(*(g if g is None else g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True))), mirror


_attention.defvjp(_forward, _backward)


def _past(static: Static, inputs: Inputs) -> Past:
    """Queries scaled, by the key head that they read: [B, G, R, N, C]."""
    batch, heads, slots, width = inputs.queries_BQNC.shape
    groups = inputs.keys_BGTC.shape[1]
    grouped = inputs.queries_BQNC.reshape(batch, groups, heads // groups, slots, width)
    queries = grouped.astype(jnp.promote_types(static.dtype, jnp.float32)) / math.sqrt(width)
    return Past(static.dtype, queries, inputs.keys_BGTC, inputs.values_BGTC, inputs.first_BN, inputs.last_BN)


def _own_dots(queries: jax.Array, own_JBGNC: jax.Array) -> jax.Array:
    """Each slot's queries times its own keys of later steps: [J, B, G, R, N, 1]. One key a slot: no matrix product."""
    # One step at a time, or the products of all of them, J times as large as the queries, would exist at once.
    dots = [jnp.sum(queries * own[:, :, None].astype(queries.dtype), axis=-1, keepdims=True) for own in own_JBGNC]
    return jnp.stack(dots) if dots else jnp.zeros((0, *queries.shape[:-1], 1), queries.dtype)


def _own_scores(inputs: Inputs, queries: jax.Array) -> jax.Array:
    allowed = inputs.own_allowed_J.reshape(-1, 1, 1, 1, 1, 1)
    return jnp.where(allowed, _own_dots(queries, inputs.own_keys_JBGNC), MASKED)


def _own_sum(weights: jax.Array, own_JBGNC: jax.Array) -> jax.Array:
    return sum((w * own[:, :, None].astype(w.dtype) for w, own in zip(weights, own_JBGNC, strict=True)), start=0.0)


def _own_gradient(weights: jax.Array, slotwise: jax.Array) -> jax.Array:
    """Of own keys or values [J, B, G, N, C]: summed over the heads of a group."""
    if not weights.shape[0]:
        return jnp.zeros((0, *slotwise.shape[:2], *slotwise.shape[3:]), slotwise.dtype)
    return jnp.stack([jnp.sum(w * slotwise, axis=2) for w in weights])
