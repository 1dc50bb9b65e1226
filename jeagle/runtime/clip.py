"""Clipping of gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `limit`.

    As optax's, but by one factor: XLA repeats a multiplication in each of the optimiser's passes, where it would store
    the quotients, a second copy of all gradients.
    """

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm > limit, limit / norm, 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
