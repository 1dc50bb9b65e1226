"""Matrix products in a chosen type, summed and returned in float32, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]], out: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=out)


def _sum_type(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, kernel: jax.Array, dtype: Any, rows: bool = False) -> jax.Array:
    """x [..., I] times kernel [I, O] (or, with `rows`, kernel [O, I] by its rows) -> float32 [..., O].

    Both operands are rounded to `dtype`; sums are float32 (float64 for float64 operands). The gradient's products are
    made in the same way: JAX's own rule would multiply a float32 cotangent with a bfloat16 operand, which no backend
    has a fast path for, and would round the kernel's gradient to bfloat16.
    """
    return _forward(x, kernel, dtype, rows)[0]


def _forward(x: jax.Array, kernel: jax.Array, dtype: Any, rows: bool) -> tuple[jax.Array, Any]:
    rounded_x, rounded_kernel = x.astype(dtype), kernel.astype(dtype)
    # Contracting over the kernel's own axis, rather than transposing it, spares XLA's CPU backend a copy of it.
    y = _dot(rounded_x, rounded_kernel, ((x.ndim - 1,), (1 if rows else 0,)), _sum_type(dtype))
    # Empty arrays carry the types to return: residuals must be arrays.
    return y, (rounded_x, rounded_kernel, jnp.empty((0,), x.dtype), jnp.empty((0,), kernel.dtype))


def _backward(dtype: Any, rows: bool, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, x_like, kernel_like = residuals
    dy = dy.astype(dtype)
    lead = tuple(range(x.ndim - 1))
    dx = _dot(dy, kernel, ((dy.ndim - 1,), (0 if rows else 1,)), _sum_type(dtype))
    dkernel = _dot(*((dy, x) if rows else (x, dy)), (lead, lead), _sum_type(dtype))
    return dx.astype(x_like.dtype), dkernel.astype(kernel_like.dtype)


matmul.defvjp(_forward, _backward)


class Linear(nnx.Module):
    """x -> x kernel (+ bias), the kernel [I, O], sums in float32.

    A kernel of int8 or float8 comes with a `scale` [O]: the product is made with the stored numbers (exact in
    bfloat16) and scaled afterwards, so that the weights take half the bytes in memory.
    """

    def __init__(
        self, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, *, bias: bool = False, stored: Any = None
    ):
        kernel = nnx.initializers.normal(0.02)(rngs.params(), (inputs, outputs))
        self.kernel = nnx.Param(kernel if stored is None else jnp.zeros(kernel.shape, stored))
        if stored is not None:
            self.scale = nnx.Param(jnp.ones(outputs))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...], self.dtype)
        y = y * self.scale[...] if hasattr(self, "scale") else y
        return y + self.bias[...] if hasattr(self, "bias") else y
