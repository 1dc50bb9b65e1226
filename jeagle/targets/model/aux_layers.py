"""After which layers a target is tapped."""

from __future__ import annotations

import itertools

from jeagle.errors import UserError


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """(2, n//2, n-3), as EAGLE-3's engines choose them.

    Raises:
      UserError: for fewer than 7 layers, where these repeat or fall.
    """
    if layers < 7:
        raise UserError(
            f"The target has {layers} layers, too few for the default auxiliary layers 2, n//2, n-3: "
            "name them with --target.aux-layers."
        )
    return (2, layers // 2, layers - 3)


def check_aux_layers(aux_layers: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """`taps`, or the default ones where empty. UserError unless they rise, once each, within 0..layers."""
    aux_layers = aux_layers or default_aux_layers(layers)
    if any(a >= b for a, b in itertools.pairwise(aux_layers)) or aux_layers[0] < 0 or aux_layers[-1] > layers:
        raise UserError(
            f"--target.aux-layers {' '.join(map(str, aux_layers))}: layer boundaries must rise, once each, from 0 "
            f"(embeddings) to {layers} (after the last of the target's {layers} layers)."
        )
    return aux_layers
