"""Rotary embeddings as a GGUF describes them, in the words of Hugging Face's config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.gguf.metadata import Metadata

# Llama 3's own scaling: the file keeps only the divisors that follow from it, so these are checked against them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}


def rope_scaling(value: Metadata, rotated: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, None for none.

    Args:
      rotated: how many dimensions of a head are rotated.

    Raises:
      UserError: for a kind of scaling that is not supported, by name.
    """
    if "rope_freqs.weight" in value.tensors:
        return _llama3(value, rotated)
    if "rope_factors_long.weight" in value.tensors:
        return _longrope(value)
    kind, factor = value("rope.scaling.type", "none"), value("rope.scaling.factor", None)
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(value, factor)
    raise UserError(f"The target {value.path} has the RoPE scaling {kind!r}, which is not supported in GGUF.")


def _yarn(value: Metadata, factor: float) -> dict[str, Any]:
    original = value("rope.scaling.original_context_length")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, key in _YARN.items():
        if (found := value(f"rope.scaling.{key}", None)) is not None:
            scaling[name] = found
    return scaling


def _llama3(value: Metadata, rotated: int) -> dict[str, Any]:
    """The scaling that gives the file's divisors of each pair's frequency."""
    divisors = np.asarray(value.vector("rope_freqs.weight"))
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    low, high, original = _LLAMA3.values()
    base = value("rope.freq_base", 10000.0)
    wavelength = 2 * math.pi * base ** (np.arange(0, rotated, 2) / rotated)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / scaling["factor"] + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(
            f"The target {value.path} divides its rotary frequencies (rope_freqs.weight) otherwise than Llama 3, which "
            "is not supported in GGUF: give the model's safetensors folder instead."
        )
    return scaling


def _longrope(value: Metadata) -> dict[str, Any]:
    """Phi's two sets of divisors, and the factor on attention where it is not the one that follows from the lengths."""
    value("rope.scaling.type", None)
    value("rope.scaling.factor", None)
    longest, original = value("context_length"), value("rope.scaling.original_context_length")
    scaling = {
        "rope_type": "longrope",
        "short_factor": value.vector("rope_factors_short.weight"),
        "long_factor": value.vector("rope_factors_long.weight"),
    }
    ratio = longest / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    stated = value("rope.scaling.attn_factor", usual)
    return scaling if math.isclose(stated, usual, rel_tol=1e-4) else scaling | {"attention_factor": stated}
