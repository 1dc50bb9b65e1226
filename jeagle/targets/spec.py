"""The shape of a target, whatever its family."""

from __future__ import annotations

import dataclasses
import itertools

from jeagle.errors import UserError
from jeagle.joints import Rope


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """What a decoder needs to know of a target.

    Attributes:
      architecture: the name in Hugging Face's config.json.
      width: H. layers: L. vocab: V. heads, kv_heads, head_dim, mlp_width: of every layer.
      norm_eps: of every RMSNorm.
      tied: whether lm_head is the embedding.
      attention_bias: biases on q, k, v and o.
      max_positions: longest sequence the target was made for.
      end_token_ids: ids that end an answer, by the model's own configuration.
    """

    architecture: str
    width: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope: Rope
    tied: bool
    attention_bias: bool = False
    max_positions: int = 2048
    end_token_ids: tuple[int, ...] = ()


def default_taps(layers: int) -> tuple[int, ...]:
    """(2, n//2, n-3), as EAGLE-3's engines choose them.

    Raises:
      UserError: for fewer than 7 layers, where these repeat or fall.
    """
    if layers < 7:
        raise UserError(
            f"The target has {layers} layers, too few for the default taps 2, n//2, n-3: name them with --target.taps."
        )
    return (2, layers // 2, layers - 3)


def check_taps(taps: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """`taps`, or the default ones where empty. UserError unless they rise, once each, within 0..layers."""
    taps = taps or default_taps(layers)
    if any(a >= b for a, b in itertools.pairwise(taps)) or taps[0] < 0 or taps[-1] > layers:
        raise UserError(
            f"--target.taps {' '.join(map(str, taps))}: layer boundaries must rise, once each, from 0 (embeddings) "
            f"to {layers} (after the last of the target's {layers} layers)."
        )
    return taps
