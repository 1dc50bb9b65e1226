"""The op: attention to step-0 keys by one of the backends, merged with each slot's own keys; and its backward pass.

The backward pass of a softmax over a union of keys needs only the output and the logsumexp of the union: with them the
weights of each part are recomputed, and its gradients follow from the part alone. So only output and logsumexp are
saved, and a backend computes no more than the step-0 keys' part, forward and backward.

Own keys and values are not saved for each step either. Each TTT step adds its own to those of the steps before, so
that saving them at every step would take memory that grows with the square of the number of steps. Yet those of the
last step contain all of them, and a step masks those that come after it. The backward pass runs from the last step to
the first, so they travel along: a `BackwardCarry` passes through the attention of every step, unused; in the backward
pass its cotangent is no gradient but the own keys and values themselves, which `deliver_to_backward` puts there after
the last step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jeagle.drafts.ttt_attention import chunked, gpu, tpu
from jeagle.drafts.ttt_attention.reference import MASKED, Step0Inputs
from jeagle.runtime.xla_workarounds import name_residual

ATTENTION = "attention"
"""Name under which rematerialisation saves the op's output and logsumexp."""

Backend = Literal["chunked", "tpu", "tpu_interpreted", "gpu", "gpu_interpreted"]
BY_PLATFORM: dict[str, Backend] = {"cpu": "chunked", "tpu": "tpu", "gpu": "gpu"}
"""The backend of a platform, where one device holds all heads of a row."""


class BackwardCarry(NamedTuple):
    """Own keys and values of steps 1..J in the backward pass; any arrays of their shapes and types in the forward."""

    keys_JBGNC: Float[Array, "J B G N C"]
    values_JBGNC: Float[Array, "J B G N C"]


OptionalCarry = TypeVar("OptionalCarry", BackwardCarry, None)


@jax.custom_vjp
def deliver_to_backward(result: Float[Array, "..."], own: BackwardCarry, carry: BackwardCarry) -> Float[Array, "..."]:
    """`result`; in the backward pass, every step through which `carry` passed gets `own`.

    Args:
      result: any array through which the gradient is taken.
      own: own keys and values after the last step.
      carry: what the last step's attention returned.
    """
    return result


deliver_to_backward.defvjp(
    lambda result, own, carry: (result, own),
    lambda own, dresult: (dresult, jax.tree.map(jnp.zeros_like, own), own),
)


class BackendPasses(NamedTuple):
    """A backend's functions, as `Step0Inputs` describes them."""

    forward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    divides: Callable[[int, int], bool]

    @classmethod
    def interpreted(cls, module: ModuleType) -> BackendPasses:
        """A module's Pallas kernels in interpret mode, which needs none of its devices."""
        forward, backward = (functools.partial(f, interpret=True) for f in (module.forward, module.backward))
        return cls(forward, backward, module.divides)


BACKENDS: dict[Backend, BackendPasses] = {
    "chunked": BackendPasses(chunked.forward, chunked.backward, lambda slots, length: True),
    "tpu": BackendPasses(tpu.forward, tpu.backward, tpu.divides),
    "tpu_interpreted": BackendPasses.interpreted(tpu),
    "gpu": BackendPasses(gpu.forward, gpu.backward, gpu.divides),
    "gpu_interpreted": BackendPasses.interpreted(gpu),
}


class AttentionArgs(NamedTuple):
    """The array arguments of `reference.reference`."""

    queries_BQNC: jax.Array
    keys_BGTC: jax.Array
    values_BGTC: jax.Array
    first_BN: jax.Array
    last_BN: jax.Array
    own_keys_JBGNC: jax.Array
    own_values_JBGNC: jax.Array
    own_allowed_J: jax.Array


def attend_ttt(
    queries_BQNC: Float[Array, "B Q N C"],
    keys_BGTC: Float[Array, "B G T C"],
    values_BGTC: Float[Array, "B G T C"],
    first_BN: Int[Array, "B N"],
    last_BN: Int[Array, "B N"],
    own_keys_JBGNC: Float[Array, "J B G N C"],
    own_values_JBGNC: Float[Array, "J B G N C"],
    own_allowed_J: Bool[Array, " J"],
    *,
    dtype: Any,
    backward_carry: OptionalCarry,
    backend: Backend = "chunked",
) -> tuple[Float[Array, "B Q N C"], OptionalCarry]:
    """Is `reference.reference`; `last_BN` must rise along each row, since each slot has another position.

    Args:
      dtype: type of the matrix products and of the result; sums are float32 or better.
      backward_carry: hands own keys and values to the backward pass (see this module's head); None saves them instead.
      backend: of the step-0 keys. Where slots or positions do not divide into a kernel's blocks, "chunked" is used.

    Returns:
      (the mixed values, the carry for the next step).

    Source: for the backward pass, FlashAttention-2 (arXiv 2307.08691), section 3.1.
    """
    args = AttentionArgs(
        queries_BQNC, keys_BGTC, values_BGTC, first_BN, last_BN, own_keys_JBGNC, own_values_JBGNC, own_allowed_J
    )
    if not BACKENDS[backend].divides(queries_BQNC.shape[2], keys_BGTC.shape[2]):
        backend = "chunked"
    return _attention(jnp.dtype(dtype), backend, args, backward_carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(dtype: Any, backend: Backend, args: AttentionArgs, carry: Any) -> tuple[jax.Array, Any]:
    return _forward(dtype, backend, args, carry)[0]


def _forward(dtype: Any, backend: Backend, args: AttentionArgs, carry: Any) -> tuple[tuple[jax.Array, Any], Any]:
    step_0 = _step_0_inputs(dtype, args)
    mixed, top, total = BACKENDS[backend].forward(step_0)
    if args.own_allowed_J.size:
        own = _own_scores(args, step_0.queries_BGRNC)
        joint = jnp.maximum(top, own.max(axis=0))
        scale, own = jnp.exp(top - joint), jnp.exp(own - joint)
        total = total * scale + own.sum(axis=0)
        mixed, top = mixed * scale + _own_sum(own, args.own_values_JBGNC), joint
    out = (mixed / total).reshape(args.queries_BQNC.shape).astype(dtype)
    out, lse = name_residual(out, ATTENTION), name_residual(top + jnp.log(total), ATTENTION)
    if carry is not None:
        args = args._replace(own_keys_JBGNC=None, own_values_JBGNC=None)
    return (out, carry), (args, out, lse)


def _backward(dtype: Any, backend: Backend, residuals: Any, cotangents: Any) -> tuple[AttentionArgs, Any]:
    (args, out, lse), (dout_BQNC, carry) = residuals, cotangents
    if carry is not None:
        args = args._replace(own_keys_JBGNC=carry.keys_JBGNC, own_values_JBGNC=carry.values_JBGNC)
    step_0 = _step_0_inputs(dtype, args)
    queries = step_0.queries_BGRNC
    dout = dout_BQNC.astype(queries.dtype).reshape(queries.shape)
    # What the softmax's normaliser subtracts from the gradient of each weight.
    dout_dot_out = jnp.sum(dout * out.reshape(dout.shape), axis=-1, keepdims=True)
    dqueries, dkeys, dvalues = BACKENDS[backend].backward(step_0, dout, lse, dout_dot_out)
    own_weights = jnp.exp(_own_scores(args, queries) - lse)
    down = own_weights * (_own_dots(dout, args.own_values_JBGNC) - dout_dot_out)
    dqueries = dqueries + _own_sum(down, args.own_keys_JBGNC)
    gradients = AttentionArgs(
        queries_BQNC=dqueries.reshape(dout_BQNC.shape) / math.sqrt(dout.shape[-1]),
        keys_BGTC=dkeys,
        values_BGTC=dvalues,
        first_BN=None,
        last_BN=None,
        own_keys_JBGNC=_own_gradient(down, queries),
        own_values_JBGNC=_own_gradient(own_weights, dout),
        own_allowed_J=None,
    )
    cast = (g if g is None else g.astype(x.dtype) for g, x in zip(gradients, args, strict=True))
    return AttentionArgs(*cast), carry


_attention.defvjp(_forward, _backward)


def _step_0_inputs(dtype: Any, args: AttentionArgs) -> Step0Inputs:
    """Queries are scaled, and grouped by the key head that they read."""
    batch, heads, slots, width = args.queries_BQNC.shape
    groups = args.keys_BGTC.shape[1]
    grouped = args.queries_BQNC.reshape(batch, groups, heads // groups, slots, width)
    queries = grouped.astype(jnp.promote_types(dtype, jnp.float32)) / math.sqrt(width)
    return Step0Inputs(dtype, queries, args.keys_BGTC, args.values_BGTC, args.first_BN, args.last_BN)


def _own_dots(queries: jax.Array, own_JBGNC: jax.Array) -> jax.Array:
    """Each slot's queries times its own keys of later steps: [J, B, G, R, N, 1]; one key a slot, so no matrix product.

    One step at a time, or the products of all steps, J times as large as the queries, would exist at once.
    """
    dots = [jnp.sum(queries * own[:, :, None].astype(queries.dtype), axis=-1, keepdims=True) for own in own_JBGNC]
    return jnp.stack(dots) if dots else jnp.zeros((0, *queries.shape[:-1], 1), queries.dtype)


def _own_scores(args: AttentionArgs, queries: jax.Array) -> jax.Array:
    allowed = args.own_allowed_J.reshape(-1, 1, 1, 1, 1, 1)
    return jnp.where(allowed, _own_dots(queries, args.own_keys_JBGNC), MASKED)


def _own_sum(weights: jax.Array, own_JBGNC: jax.Array) -> jax.Array | float:
    return sum((w * own[:, :, None].astype(w.dtype) for w, own in zip(weights, own_JBGNC, strict=True)), start=0.0)


def _own_gradient(weights: jax.Array, slotwise: jax.Array) -> jax.Array:
    """The gradient of own keys or values [J, B, G, N, C]: summed over the heads of a group."""
    if not weights.shape[0]:
        return jnp.zeros((0, *slotwise.shape[:2], *slotwise.shape[3:]), slotwise.dtype)
    return jnp.stack([jnp.sum(w * slotwise, axis=2) for w in weights])
