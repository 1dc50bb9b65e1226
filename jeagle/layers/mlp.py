"""Gated feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jeagle.layers.linear import Linear


def _gated(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda gate, up: activation(gate) * up


# (gate, up) -> activation(gate) * up, by the activation's name in Hugging Face's configurations.
GATES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": _gated(jax.nn.silu),
    "swish": _gated(jax.nn.silu),
    "gelu": _gated(functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_pytorch_tanh": _gated(functools.partial(jax.nn.gelu, approximate=True)),
    "gelu_new": _gated(functools.partial(jax.nn.gelu, approximate=True)),
    "relu": _gated(jax.nn.relu),
}


class GatedMLP(nnx.Module):
    """Kernels of down(silu(gate(x)) * up(x)), without biases; drafts compute it themselves, in chunks of positions.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, width: int, inner: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.gate_proj = nnx.Param(init(rngs.params(), (width, inner)))
        self.up_proj = nnx.Param(init(rngs.params(), (width, inner)))
        self.down_proj = nnx.Param(init(rngs.params(), (inner, width)))
        self.dtype = dtype


class Dense(nnx.Module):
    """down(activation(gate(x)) * up(x)), with any activation, optional biases, and optionally narrow weights.

    Source: as for `GatedMLP`.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        activation: str = "silu",
        bias: bool = False,
        stored: Any = None,
    ):
        self.gate_proj = Linear(width, inner, dtype, rngs, bias=bias, stored=stored)
        self.up_proj = Linear(width, inner, dtype, rngs, bias=bias, stored=stored)
        self.down_proj = Linear(inner, width, dtype, rngs, bias=bias, stored=stored)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(GATES[self.activation](self.gate_proj(x), self.up_proj(x)))
