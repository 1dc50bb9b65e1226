"""Feed-forward parts."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jeagle.layers.linear import matmul


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, width: int, inner: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.gate_proj = nnx.Param(init(rngs.params(), (width, inner)))
        self.up_proj = nnx.Param(init(rngs.params(), (width, inner)))
        self.down_proj = nnx.Param(init(rngs.params(), (inner, width)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = matmul(x, self.gate_proj[...], self.dtype)
        up = matmul(x, self.up_proj[...], self.dtype)
        return matmul(jax.nn.silu(gate) * up, self.down_proj[...], self.dtype)
