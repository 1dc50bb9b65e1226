"""Rotary position embedding, half-split convention (as in Hugging Face's Llama)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.errors import UserError
from jeagle.joints import Rope

ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each rotated pair: float64 [head_dim / 2].

    Raises:
      UserError: for a scaling that is not one of `ROPE_TYPES`.

    Source: RoFormer (arXiv 2104.09864); "llama3" as in Llama 3.1's reference code: long wavelengths are divided by
    `factor`, short ones kept, the band between interpolated.
    """
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = rope.scaling_dict
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "llama3":
        return _llama3(plain, scaling)
    raise UserError(f"RoPE scaling {kind!r} is not supported; one of {', '.join(ROPE_TYPES)} is.")


def _llama3(plain: np.ndarray, scaling: dict) -> np.ndarray:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return plain * ((1 - smooth) / factor + smooth)


def rotate(x: jax.Array, positions: jax.Array, inverse_frequency: np.ndarray) -> jax.Array:
    """Rotates x [..., T, heads, head_dim] by the angles of positions [..., T]."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequency, jnp.float32)
    kind = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.cos(angles)[..., None, :].astype(kind), jnp.sin(angles)[..., None, :].astype(kind)
    low, high = jnp.split(x.astype(kind), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
