"""The loss over vocabulary-wide logits, a chunk of teacher positions at a time, its gradients made on the way.

Slots are laid out by the position that teaches them: all TTT steps that learn from position m stand together, so the
teacher's softmax is made once a position, and one chunk's logits are the only vocabulary-wide arrays alive. The loss is
a scalar, so a chunk's gradients are made in the forward pass and merely scaled in the backward pass: no second matmul.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.joints import PLAIN_LOGITS, LogitShape
from jeagle.objective.losses import Teacher, overlap, weighted
from jeagle.runtime.numerics import first_largest


class Taught(NamedTuple):
    """Teacher positions and what they teach, all [B, M, ...] or [K, B, M].

    Attributes:
      last_BMH: the target's final states; head_DH reads them.
      head_DH: the target's lm_head rows of the draft vocabulary.
      lse_BM: logsumexp of the target's logits over its whole vocabulary.
      label_BM: the target's argmax as a draft vocabulary entry, -1 where the draft cannot say it.
      weight_KBM: what a slot's loss is multiplied with; 0 where there is none.
    """

    last_BMH: jax.Array
    head_DH: jax.Array
    lse_BM: jax.Array
    label_BM: jax.Array
    weight_KBM: jax.Array


class Slotwise(NamedTuple):
    """What the chunks leave behind for metrics: [K, B, M] each, without gradient."""

    loss: jax.Array
    accepted: jax.Array
    correct: jax.Array


class Recipe(NamedTuple):
    """What is static about a loss.

    Attributes:
      terms: weighted loss names.
      renormalised: acceptance is taken against the teacher renormalised over the draft vocabulary (speculators), not
        over the whole one (SpecForge, and what a server does).
      dtype: of the matrix products; sums are float32 or better.
      chunk: M positions at a time; M must be a multiple of it.
      logits: what the target's family does to its logits.
    """

    terms: tuple[tuple[float, str], ...]
    renormalised: bool
    dtype: Any
    chunk: int
    logits: LogitShape = PLAIN_LOGITS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss(
    recipe: Recipe, hidden_KBMW: jax.Array, lm_head_DW: jax.Array, taught: Taught
) -> tuple[jax.Array, Slotwise]:
    """sum of weight * loss over all slots, and the slots' figures.

    Args:
      hidden_KBMW: what the draft's lm_head reads at the slots, by teacher position.
      lm_head_DW: the draft's lm_head.

    Source: EAGLE-3 (arXiv 2503.01840) for the loss; gradients in the forward pass as in Liger (arXiv 2410.10989).
    """
    (total, _), (slotwise, _) = _scan(recipe, hidden_KBMW, lm_head_DW, taught, with_gradient=False)
    return total, slotwise


def _forward(recipe, hidden_KBMW, lm_head_DW, taught):
    carry, (slotwise, dhidden) = _scan(recipe, hidden_KBMW, lm_head_DW, taught, with_gradient=True)
    total, dhead = carry
    return (total, slotwise), (_join(dhidden).astype(hidden_KBMW.dtype), dhead.astype(lm_head_DW.dtype), taught)


def _backward(recipe, residuals, cotangents):
    dhidden, dhead, taught = residuals
    scale = cotangents[0]
    nothing = jax.tree.map(_zero_cotangent, taught)
    return (dhidden * scale).astype(dhidden.dtype), (dhead * scale).astype(dhead.dtype), nothing


chunked_loss.defvjp(_forward, _backward)


def _zero_cotangent(x: jax.Array) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else None


def _dot(a: jax.Array, b: jax.Array, dtype: Any, over: tuple[Any, Any]) -> jax.Array:
    total = jnp.promote_types(dtype, jnp.float32)
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), (over, ((), ())), preferred_element_type=total)


def _split(x: jax.Array, axis: int, chunk: int) -> jax.Array:
    shape = (*x.shape[:axis], x.shape[axis] // chunk, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join(x: jax.Array) -> jax.Array:
    """[chunks, K, B, m, ...] -> [K, B, M, ...]."""
    return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])


def _scan(recipe, hidden_KBMW, lm_head_DW, taught, *, with_gradient):
    loss_of, dtype, chunk = weighted(recipe.terms), recipe.dtype, recipe.chunk

    def body(carry, parts):
        total, dhead = carry
        hidden, last, lse, label, weight = parts
        teacher_logits = recipe.logits(_dot(last, taught.head_DH, dtype, ((2,), (1,))))
        probs = jax.nn.softmax(teacher_logits, axis=-1)
        teacher = Teacher(probs, probs if recipe.renormalised else jnp.exp(teacher_logits - lse[..., None]))
        logits = _dot(hidden, lm_head_DW, dtype, ((3,), (1,)))

        def weighted_sum(logits):
            losses = loss_of(logits, teacher)
            return jnp.sum(jnp.where(weight != 0, losses * weight, 0.0)), losses

        figures = (overlap(logits, teacher.full_probs), first_largest(logits) == label)
        if not with_gradient:
            chunk_total, losses = weighted_sum(logits)
            return (total + chunk_total, dhead), (Slotwise(losses, *figures), ())
        dlogits, losses, chunk_total = _gradient(weighted_sum, logits)
        dhidden = _dot(dlogits, lm_head_DW, dtype, ((3,), (0,)))
        dhead = dhead + _dot(dlogits, hidden, dtype, ((0, 1, 2), (0, 1, 2)))
        return (total + chunk_total, dhead), (Slotwise(losses, *figures), dhidden)

    kind = jnp.promote_types(dtype, jnp.float32)
    dhead = jnp.zeros(lm_head_DW.shape, kind) if with_gradient else ()
    parts = (
        _split(hidden_KBMW, 2, chunk),
        _split(taught.last_BMH, 1, chunk),
        _split(taught.lse_BM, 1, chunk),
        _split(taught.label_BM, 1, chunk),
        _split(taught.weight_KBM, 2, chunk),
    )
    carry, (slotwise, dhidden) = jax.lax.scan(body, (jnp.zeros((), kind), dhead), parts)
    return carry, (jax.tree.map(_join, slotwise), dhidden)


def _gradient(function, logits):
    (value, losses), gradient = jax.value_and_grad(function, has_aux=True)(logits)
    return gradient, losses, value
