"""Products with trained weights whose backward passes are written by hand, to save memory or time.

`trained_linear(x, kernel)` is x @ kernel, `scaled_linear(x, scale, kernel)` is (x * scale) @ kernel, and `chunked_mlp`
is down(silu(gate(x)) * up(x)). tests/drafts/test_trained_products.py proves them equal to these plain forms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jeagle.runtime.xla_workarounds import add_in_place, contract_rows, flat_matmul, kernel_gradient


@jax.custom_vjp
def trained_linear(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """x @ kernel, multiplied in x's type and summed and returned in float32 or better.

    The backward pass multiplies in x's type too, and returns the kernel's gradient in the kernel's type. JAX's own rule
    would multiply a float32 cotangent with a bfloat16 operand, for which no backend has a fast path, and would round
    the kernel's gradient to bfloat16.
    """
    return flat_matmul(x, kernel.astype(x.dtype))


def _linear_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    dx = flat_matmul(dy, kernel.astype(x.dtype), transposed=True)
    return dx.astype(x.dtype), kernel_gradient(x, dy).astype(kernel.dtype)


trained_linear.defvjp(lambda x, kernel: (trained_linear(x, kernel), (x, kernel)), _linear_backward)


def scaled_linear(
    x: Float[Array, "*rows I"], scale: Float[Array, " I"], kernel: Float[Array, "I O"]
) -> Float[Array, "*rows O"]:
    """(x * scale) @ kernel for an x that needs no gradient; it gets zeros.

    The scale is multiplied into the kernel, so that its gradient follows from the kernel's: the product that the
    gradient of x would take is never computed.
    """
    return trained_linear(jax.lax.stop_gradient(x), scale[:, None] * kernel)


MLP_CHUNK = 2048
"""Units of the inner width that `chunked_mlp` computes at a time: 16 MB in float32 for 2048 slots."""


class MLPKernels(NamedTuple):
    """The kernels of a gated MLP, float32: W is its width, F its inner width."""

    gate_WF: Float[Array, "W F"]
    up_WF: Float[Array, "W F"]
    down_FW: Float[Array, "F W"]


_INNER_AXES = MLPKernels(1, 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_mlp(
    dtype: Any, normed: Float[Array, "*rows W"], kernels: MLPKernels, carried: MLPKernels
) -> tuple[Float[Array, "*rows W"], MLPKernels]:
    """(down(silu(gate(x)) * up(x)), `carried`), from MLP_CHUNK inner units at a time, saving nothing but its input.

    Autodiff of a scan over TTT steps computes each step's gradient of a kernel by itself and then adds it to the sum of
    the later steps, so that the widest kernels have two gradients for a moment. Here the kernels pass through every
    step as `carried`, unused; in the backward pass their cotangent is the sum so far, and each step adds to it in
    place. No array but kernels and their sums is as wide as F. W3 with rematerialisation saves 0.9 GB.

    Args:
      dtype: type of the products; sums are float32 or better.
      normed: x, in `dtype`.
      kernels: what is multiplied with; no gradient is given to them.
      carried: the same kernels at the first step, then the second result of the step before. They get the gradient.
    """
    sum_type = jnp.promote_types(dtype, jnp.float32)

    def add_chunk(y: jax.Array, chunk: jax.Array) -> tuple[jax.Array, None]:
        gate, up, down = _chunk_of(kernels, chunk, dtype)
        inner = jax.nn.silu(flat_matmul(normed, gate)) * flat_matmul(normed, up)
        return y + flat_matmul(inner.astype(dtype), down), None

    y, _ = jax.lax.scan(add_chunk, jnp.zeros(normed.shape, sum_type), jnp.arange(_chunks(kernels)))
    return y, carried


def _mlp_backward(dtype, residuals, cotangents):
    (normed, kernels), (dy, sums) = residuals, cotangents
    dy = dy.astype(dtype)

    def add_chunk(carry: tuple[jax.Array, MLPKernels], chunk: jax.Array) -> tuple[tuple[jax.Array, MLPKernels], None]:
        dnormed, sums = carry
        gate_kernel, up_kernel, down_kernel = _chunk_of(kernels, chunk, dtype)
        activated, pull_back = jax.vjp(
            lambda gate, up: jax.nn.silu(gate) * up, flat_matmul(normed, gate_kernel), flat_matmul(normed, up_kernel)
        )
        dgate, dup = (g.astype(dtype) for g in pull_back(flat_matmul(dy, down_kernel, transposed=True)))
        dnormed = dnormed + flat_matmul(dgate, gate_kernel, transposed=True)
        dnormed = dnormed + flat_matmul(dup, up_kernel, transposed=True)
        gradients = MLPKernels(
            contract_rows(normed, dgate), contract_rows(normed, dup), contract_rows(activated.astype(dtype), dy)
        )
        start = chunk * dgate.shape[-1]
        add = lambda total, part, axis: add_in_place(total, part, start, axis)  # noqa: E731
        return (dnormed, jax.tree.map(add, sums, gradients, _INNER_AXES)), None

    start = jnp.zeros(normed.shape, jnp.promote_types(dtype, jnp.float32)), sums
    (dnormed, sums), _ = jax.lax.scan(add_chunk, start, jnp.arange(_chunks(kernels)))
    return dnormed.astype(dtype), MLPKernels(None, None, None), sums


chunked_mlp.defvjp(
    lambda dtype, normed, kernels, carried: (chunked_mlp(dtype, normed, kernels, carried), (normed, kernels)),
    _mlp_backward,
)


def _chunks(kernels: MLPKernels) -> int:
    """The smallest number of equal chunks of at most MLP_CHUNK inner units."""
    inner = kernels.down_FW.shape[0]
    return next(chunks for chunks in range(-(-inner // MLP_CHUNK), inner + 1) if inner % chunks == 0)


def _chunk_of(kernels: MLPKernels, chunk: jax.Array, dtype: Any) -> MLPKernels:
    width = kernels.down_FW.shape[0] // _chunks(kernels)

    def cut(kernel: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(kernel, chunk * width, width, axis).astype(dtype)

    return jax.tree.map(cut, kernels, _INNER_AXES)
