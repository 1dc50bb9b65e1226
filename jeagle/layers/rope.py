"""Rotary position embedding (RoPE), with every scaling that Hugging Face's configurations name."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jeagle.errors import UserError
from jeagle.interfaces import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " pairs"]:
    """The angle per position of each rotated pair, in radians: float64 [rotary_dim / 2].

    For "dynamic" and "longrope", whose angles depend on the length of the sequence, these are the angles of short ones.

    Raises:
      UserError: for a scaling that is not one of `SCALINGS`.

    Source: RoFormer (arXiv 2104.09864); the scalings as in transformers' modeling_rope_utils.py.
    """
    kind: Any = rope.scaling_dict.get("rope_type", "default")
    if kind not in SCALINGS:
        raise UserError(f"RoPE scaling {kind!r} is not supported; supported are: {', '.join(SCALINGS)}.")
    return SCALINGS[kind](rope, _unscaled(rope, head_dim))


def attention_factor(rope: Rope) -> float:
    """The factor that rotated queries and rotated keys are each multiplied by (YaRN, LongRoPE); 1 for other scalings.

    Source: YaRN (arXiv 2309.00071), section 3.4; LongRoPE (arXiv 2402.13753); DeepSeek's mscale.
    """
    scaling = rope.scaling_dict
    if scaling.get("rope_type") not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return yarn_mscale(factor, scaling["mscale"]) / yarn_mscale(factor, scaling["mscale_all_dim"])
    # DeepSeek-R1-0528-Qwen3-8B has attn_factor, which vLLM and SGLang apply and transformers ignores.
    return yarn_mscale(factor, 1.0) * scaling.get("attn_factor", 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """0.1 * weight * ln(factor) + 1, and 1 for factors up to 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def depends_on_length(rope: Rope) -> bool:
    """Whether the angles depend on the length of the sequence."""
    return rope.scaling_dict.get("rope_type") in ("dynamic", "longrope")


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """The number of a head's dimensions that are rotated; they are the first ones."""
    if rope.scaling_dict.get("rope_type") == "proportional":
        return head_dim
    return int(head_dim * rope.scaling_dict.get("partial_rotary_factor", 1.0))


def rotate_by(
    rope: Rope,
    x: Float[Array, "*T heads C"],
    positions: Int[Array, "*T"],
    lengths: Int[Array, "*T"] | None = None,
    *,
    interleaved: bool = False,
) -> Float[Array, "*T heads C"]:
    """Rotates queries or keys by the angles of their positions, in float32 or better.

    Args:
      lengths: length of each token's sequence; used only where `depends_on_length` is true.
      interleaved: rotated pairs are neighbours (0, 1), (2, 3), ... instead of the two halves of a head.
    """
    frequencies = _frequencies_at(rope, x.shape[-1], lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    factor = attention_factor(rope)
    kind = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = ((turn(angles) * factor)[..., None, :].astype(kind) for turn in (jnp.cos, jnp.sin))
    rotated, rest = jnp.split(x.astype(kind), [2 * frequencies.shape[-1]], axis=-1)
    if interleaved:
        even, odd = rotated[..., 0::2], rotated[..., 1::2]
        rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(rotated.shape)
    else:
        low, high = jnp.split(rotated, 2, axis=-1)
        rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _frequencies_at(rope: Rope, head_dim: int, lengths: jax.Array | None) -> jax.Array:
    """`inverse_frequencies` of each token, float32, for the length of its sequence."""
    short = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    if not depends_on_length(rope):
        return short
    if lengths is None:
        raise ValueError(f"rope {rope.scaling_dict['rope_type']} needs the sequences' lengths")
    scaling, dim = rope.scaling_dict, rotary_dim(rope, head_dim)
    original = scaling["original_max_position_embeddings"]
    lengths = lengths[..., None].astype(jnp.float32)
    if scaling["rope_type"] == "longrope":
        long = _unscaled(rope, head_dim) / np.asarray(scaling["long_factor"], np.float64)
        return jnp.where(lengths > original, jnp.asarray(long, jnp.float32), short)
    grown = scaling["factor"] * jnp.maximum(lengths, original) / original - (scaling["factor"] - 1)
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return 1.0 / (rope.theta * grown ** (dim / (dim - 2))) ** exponents


def _unscaled(rope: Rope, head_dim: int) -> np.ndarray:
    """Inverse frequencies without any scaling."""
    dim = rotary_dim(rope, head_dim)
    return 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Frequencies of long wavelengths are divided by `factor`; those in a band below are interpolated (Llama 3.1)."""
    scaling = rope.scaling_dict
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    band = high - low or 1e-9  # in Llama 4 Scout the band is empty
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / band, 0.0, 1.0)
    return plain * ((1 - smooth) / scaling["factor"] + smooth)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """A ramp over dimensions from unscaled to divided by `factor`; YaRN (arXiv 2309.00071), section 3.2."""
    scaling, dim = rope.scaling_dict, 2 * len(plain)

    def dimension_of(turns: float) -> float:
        original = scaling["original_max_position_embeddings"]
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return plain * (ramp / scaling["factor"] + 1 - ramp)


def _proportional(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """The first `partial_rotary_factor` of the pairs are rotated as in plain RoPE, the others not at all (Gemma 4)."""
    scaling = rope.scaling_dict
    rotating = int(scaling.get("partial_rotary_factor", 1.0) * len(plain))
    return np.where(np.arange(len(plain)) < rotating, plain, 0.0) / scaling.get("factor", 1.0)


SCALINGS: dict[str, Callable[[Rope, np.ndarray], np.ndarray]] = {
    "default": lambda rope, plain: plain,
    "linear": lambda rope, plain: plain / rope.scaling_dict["factor"],
    "dynamic": lambda rope, plain: plain,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": lambda rope, plain: plain / np.asarray(rope.scaling_dict["short_factor"], np.float64),
    "proportional": _proportional,
}
