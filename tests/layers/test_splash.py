"""The splash kernel, run by an interpreter, equals attention in plain blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.layers import AttentionMask, masked_attention, packed_attention
from jeagle.runtime.mesh import make_mesh

B, T, Q, G = 2, 256, 4, 2
SINKS = jnp.asarray([0.5, -1.0, 2.0, 0.0])
CASES = {
    "plain": ({}, 128, 128),
    "window": ({"window": 40}, 128, 128),
    "chunk": ({"chunk": 64, "scale": 0.2}, 128, 128),
    "cap and sinks": ({"soft_cap": 5.0, "sinks_Q": SINKS}, 64, 64),
    "latent attention's widths": ({"scale": 0.07}, 192, 128),
}


def case(width: int, values: int):
    """Two packed rows; the first ends in padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, Q, width), (B, T, G, width), (B, T, G, values))
    segments = np.repeat(np.array([[1, 2, 3, 0], [1, 1, 1, 2]]), T // 4, axis=1)
    segments[0, 64:80] = 1
    begins, here = np.diff(segments, axis=1, prepend=-1) != 0, np.arange(T)
    positions = here - np.maximum.accumulate(np.where(begins, here, 0), axis=1)
    mask = AttentionMask(*map(jnp.asarray, (positions, positions, segments, segments)))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)], mask


@pytest.mark.parametrize("name", CASES)
def test_as_plain_attention(name):
    switches, width, values = CASES[name]
    arrays, mask = case(width, values)
    wanted = masked_attention(*arrays, mask, jnp.float32, **switches)
    found = packed_attention(*arrays, mask, jnp.float32, interpret=True, **switches)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_over_a_mesh_of_rows_and_heads():
    """Each device runs the kernel on its own rows and heads."""
    arrays, mask = case(128, 128)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    wanted = masked_attention(*arrays, mask, jnp.float32, sinks_Q=SINKS)
    axes = {"mesh": mesh, "row_axes": ("fsdp",), "head_axis": "tensor"}
    run = jax.jit(lambda *a: packed_attention(*a, mask, jnp.float32, sinks_Q=SINKS, interpret=True, **axes))
    np.testing.assert_allclose(run(*arrays), wanted, atol=1e-5)
