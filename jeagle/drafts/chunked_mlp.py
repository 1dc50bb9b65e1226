"""A gated MLP of a TTT step that keeps nothing but its input, and whose gradients never exist twice.

Autodiff of a scan makes each step's gradient of a kernel by itself and then adds it to the sum of those before: for a
moment the widest kernels have two gradients. Here the kernels pass through every step's MLP as `Kernels`, unused; on
the way back their cotangent is the sum so far, and each step adds to it in place, some of the inner width at a time.
So what is as wide as the MLP exists in pieces alone: activations, kernels in the type of the products, gradients.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jeagle.layers import GatedMLP
from jeagle.runtime.numerics import add_in_place, rows_product, summed_product

WIDEST = 2048  # of the inner width at a time: at 2048 slots a piece of the activations is 16 MB in float32


class Kernels(NamedTuple):
    """Of a `GatedMLP`, in float32."""

    gate_WF: jax.Array
    up_WF: jax.Array
    down_FW: jax.Array

    @classmethod
    def of(cls, mlp: GatedMLP) -> Kernels:
        return cls(mlp.gate_proj[...], mlp.up_proj[...], mlp.down_proj[...])


_INNER = Kernels(1, 1, 0)  # the axis of each that is worked through in pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lean_mlp(dtype: Any, normed: jax.Array, kernels: Kernels, passed: Kernels) -> tuple[jax.Array, Kernels]:
    """(down(silu(gate(x)) * up(x)), `passed`), products in `dtype` and summed in float32.

    Args:
      normed: x [..., W] in `dtype`.
      kernels: no gradient is given to them.
      passed: the same kernels, before the first step; what the step before gave back, after. They get the gradient.
    """
    total = jnp.promote_types(dtype, jnp.float32)

    def body(y: jax.Array, piece: jax.Array) -> tuple[jax.Array, None]:
        gate, up, down = _piece(kernels, piece, dtype)
        inner = jax.nn.silu(rows_product(normed, gate)) * rows_product(normed, up)
        return y + rows_product(inner.astype(dtype), down), None

    y, _ = jax.lax.scan(body, jnp.zeros(normed.shape, total), jnp.arange(_pieces(kernels)))
    return y, passed


def _forward(dtype, normed, kernels, passed):
    return lean_mlp(dtype, normed, kernels, passed), (normed, kernels)


def _backward(dtype, residuals, cotangents):
    (normed, kernels), (dy, sums) = residuals, cotangents
    dy = dy.astype(dtype)

    def body(carry: tuple[jax.Array, Kernels], piece: jax.Array) -> tuple[tuple[jax.Array, Kernels], None]:
        dnormed, sums = carry
        gate_kernel, up_kernel, down_kernel = _piece(kernels, piece, dtype)
        activated, back = jax.vjp(
            lambda gate, up: jax.nn.silu(gate) * up, rows_product(normed, gate_kernel), rows_product(normed, up_kernel)
        )
        dgate, dup = (g.astype(dtype) for g in back(rows_product(dy, down_kernel, rows=True)))
        dnormed = dnormed + rows_product(dgate, gate_kernel, rows=True) + rows_product(dup, up_kernel, rows=True)
        found = Kernels(
            summed_product(normed, dgate), summed_product(normed, dup), summed_product(activated.astype(dtype), dy)
        )
        at = piece * dgate.shape[-1]
        sums = jax.tree.map(lambda whole, part, axis: add_in_place(whole, part, at, axis), sums, found, _INNER)
        return (dnormed, sums), None

    start = jnp.zeros(normed.shape, jnp.promote_types(dtype, jnp.float32)), sums
    (dnormed, sums), _ = jax.lax.scan(body, start, jnp.arange(_pieces(kernels)))
    return dnormed.astype(dtype), Kernels(None, None, None), sums


lean_mlp.defvjp(_forward, _backward)


def _pieces(kernels: Kernels) -> int:
    """How many pieces the inner width is worked through in."""
    inner = kernels.down_FW.shape[0]
    return next(pieces for pieces in range(-(-inner // WIDEST), inner + 1) if inner % pieces == 0)


def _piece(kernels: Kernels, piece: jax.Array, dtype: Any) -> Kernels:
    width = kernels.down_FW.shape[0] // _pieces(kernels)

    def cut(kernel: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(kernel, piece * width, width, axis).astype(dtype)

    return jax.tree.map(cut, kernels, _INNER)
