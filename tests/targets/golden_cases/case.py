"""What a case of the goldens is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """hidden: a multiple of 32. layers: at least 2."""

    hidden: int
    layers: int

    @property
    def head(self) -> int:
        return self.hidden // 4


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
      architecture: transformers' class.
      config: what config.json says beside `BASE`; None takes a key of `BASE` away.
      layers: how many, unless the command line says otherwise.
      tokens: length of the golden's rows.
      published: config.json holds just these keys, in the schema of published checkpoints (rope_theta, rope_scaling),
        instead of all that save_pretrained writes.
      text: for a model of several modalities, config.json's `text_config`.
      stored: how the weights lie, where it is not as save_pretrained has it: a key of golden_formats.FORMATS.
      extra: names of tensors that published checkpoints hold beside the model (multi-token prediction); {L} is the
        number of layers.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    tokens: int = 16
    published: bool = False
    text: dict[str, Any] | None = None
    stored: str = ""
    extra: tuple[str, ...] = ()


BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": lambda s: s.hidden,
    "intermediate_size": lambda s: s.hidden,
    "num_hidden_layers": lambda s: s.layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,  # large enough to be missed
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def pattern(*kinds: Any) -> Callable[[Shape], list[Any]]:
    """The kinds in turn, one a layer."""
    return lambda s: [kinds[i % len(kinds)] for i in range(s.layers)]


def ending(kind: Any, *kinds: Any) -> Callable[[Shape], list[Any]]:
    """The kinds in turn, but `kind` for the last layer."""
    return lambda s: [kinds[i % len(kinds)] for i in range(s.layers - 1)] + [kind]


def factors(first: float, step: float, part: float = 1.0) -> Callable[[Shape], list[float]]:
    """One factor for each frequency of the rotated part of a head."""
    return lambda s: [round(first + step * i, 3) for i in range(int(s.head * part) // 2)]


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
YARN = {"factor": 4.0, "original_max_position_embeddings": 12, "beta_fast": 0.3, "beta_slow": 0.05}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(kind: str = "default", theta: float = 1000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta} | more


LLAMA = {"rope_parameters": rope()}
EXPERT = {"moe_intermediate_size": lambda s: s.hidden // 4}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
