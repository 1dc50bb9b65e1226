"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B H"], scale: Float[Array, "*H"] | None, eps: float) -> Float[Array, "*B H"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 or better.

    Args:
      scale: weights [H], or one for all; None = no weights.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return normed if scale is None else normed * scale
