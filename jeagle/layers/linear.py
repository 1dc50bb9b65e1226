"""Matrix products in a chosen type, summed and returned in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num


def matmul(
    x: Float[Array, "*B I"], kernel: Num[Array, "_ _"], dtype: Any, *, by_rows: bool = False
) -> Float[Array, "*B O"]:
    """x times kernel [I, O] (or, with `by_rows`, the transpose of kernel [O, I]) in float32.

    Both operands are rounded to `dtype`; sums are float32 (float64 for float64 operands).
    """
    # Contracting over the kernel's own axis, rather than transposing it, spares XLA's CPU backend a copy of it.
    contract = ((x.ndim - 1,), (1 if by_rows else 0,))
    total = jnp.promote_types(dtype, jnp.float32)
    operands = x.astype(dtype), kernel.astype(dtype)
    return jax.lax.dot_general(*operands, (contract, ((), ())), preferred_element_type=total)


class Linear(nnx.Module):
    """x -> x kernel (+ bias), with kernel [I, O] and sums in float32.

    A kernel stored as int8 or float8 has a `scale` [O]: the product is made with the stored numbers (which bfloat16
    represents exactly) and scaled afterwards, so that the weights take half the bytes in memory.
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
