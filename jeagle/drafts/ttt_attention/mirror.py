"""Own keys and values that a backward pass brings along, instead of keeping a copy of them for every step.

Each TTT step adds its own keys to those of the steps before. Kept for each step's backward pass, they would take
memory with the square of the number of steps; yet those after the last step hold all of them, and a step may be shown
too many, since it masks the ones that have not happened. The backward pass goes from the last step to the first. So a
`Mirror` passes through the attention of every step, unused: on the way back, its cotangent is no gradient but the own
keys and values themselves, put there by `reflect` after the last step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mirror(NamedTuple):
    """Own keys and values of steps 1..J, on the way back; anything of their shapes and types on the way forward."""

    keys_JBGNC: jax.Array
    values_JBGNC: jax.Array


@jax.custom_vjp
def reflect(result: jax.Array, own: Mirror, mirror: Mirror) -> jax.Array:
    """`result`; and whoever passed `mirror` on has `own` in the backward pass, in place of the mirror's gradient.

    Args:
      result: of which the gradient is taken. own: as they are after the last step. mirror: after the last step.
    """
    return result


def _forward(result: jax.Array, own: Mirror, mirror: Mirror) -> tuple[jax.Array, Mirror]:
    return result, own


def _backward(own: Mirror, dresult: jax.Array) -> tuple[jax.Array, Mirror, Mirror]:
    return dresult, Mirror(*(jnp.zeros_like(x) for x in own)), own


reflect.defvjp(_forward, _backward)
