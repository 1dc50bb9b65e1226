"""After which layers a target is tapped."""

from __future__ import annotations

import itertools

from jeagle.errors import UserError


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
