"""Matrix products, gated MLPs and RMSNorm; products are in a chosen type, and their sums in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num


def rms_norm(x: Float[Array, "*B H"], scale: Float[Array, "*H"] | None, eps: float) -> Float[Array, "*B H"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 or better.

    Args:
      scale: weights [H], or one for all; None = no weights.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return normed if scale is None else normed * scale


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


# (gate, up) -> activation(gate) * up, by the activation's name in Hugging Face's configurations.
GATES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "swish": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_pytorch_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "gelu_new": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "relu": lambda gate, up: jax.nn.relu(gate) * up,
}


class GatedMLP(nnx.Module):
    """Kernels of down(silu(gate(x)) * up(x)), without biases; drafts compute it themselves, in chunks of positions.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, width: int, inner: int, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.gate_proj, self.up_proj = (nnx.Param(init(rngs.params(), (width, inner))) for _ in range(2))
        self.down_proj = nnx.Param(init(rngs.params(), (inner, width)))
        self.dtype = dtype


class Dense(nnx.Module):
    """down(activation(gate(x)) * up(x)), with any activation, optional biases, and optionally narrow weights.

    Args:
      activation: one of `GATES`.
      options: `bias` and `stored` of every `Linear`.

    Source: as for `GatedMLP`.
    """

    def __init__(self, width: int, inner: int, dtype: Any, rngs: nnx.Rngs, *, activation: str = "silu", **options: Any):
        self.gate_proj = Linear(width, inner, dtype, rngs, **options)
        self.up_proj = Linear(width, inner, dtype, rngs, **options)
        self.down_proj = Linear(inner, width, dtype, rngs, **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(GATES[self.activation](self.gate_proj(x), self.up_proj(x)))
