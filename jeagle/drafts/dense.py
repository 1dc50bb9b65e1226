"""Products with trained weights, in a chosen type, summed in float32, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jeagle.runtime.numerics import rows_product, summed_product


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, O], in x's type -> [..., O], float32 or better.

    The gradient's products are made in x's type too, and the kernel's gradient is summed and returned in the kernel's:
    JAX's own rule would multiply a float32 cotangent with a bfloat16 operand, which no backend has a fast path for, and
    would round the kernel's gradient.
    """
    return rows_product(x, kernel.astype(x.dtype))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    dx = rows_product(dy, kernel.astype(x.dtype), rows=True)
    return dx.astype(x.dtype), _kernel_gradient(x, dy).astype(kernel.dtype)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    if x.shape[-1] <= dy.shape[-1]:
        return summed_product(x, dy)
    # XLA would turn the product round again if it saw the transposition.
    return jax.lax.optimization_barrier(summed_product(dy, x)).T


dense.defvjp(_forward, _backward)


@jax.custom_vjp
def scaled_dense(x: jax.Array, scale: jax.Array, kernel: jax.Array) -> jax.Array:
    """(x * scale) times kernel for an x [..., I] that needs no gradient; scale [I], kernel [I, O] -> [..., O].

    The scale is multiplied into the kernel, so that its gradient follows from the kernel's: the product that x's own
    gradient would take is never made.
    """
    return rows_product(x, (scale[:, None] * kernel).astype(x.dtype))


def _scaled_forward(x, scale, kernel):
    return scaled_dense(x, scale, kernel), (x, scale, kernel)


def _scaled_backward(residuals, dy):
    x, scale, kernel = residuals
    dproduct = _kernel_gradient(x, dy.astype(x.dtype)).astype(kernel.dtype)
    return jnp.zeros_like(x), jnp.sum(dproduct * kernel, axis=1), dproduct * scale[:, None]


scaled_dense.defvjp(_scaled_forward, _scaled_backward)
