"""What every part of a decoder is built with."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.sharding import Mesh


class Build:
    """What every part of a decoder is built with.

    Attributes:
      dtype: of matrix products. stored: None, or the narrow type that kernels are kept in.
      mesh: for experts, and attention on TPUs.
    """

    def __init__(self, dtype: Any, rngs: nnx.Rngs, stored: Any = None, mesh: Mesh | None = None):
        self.dtype, self.rngs, self.stored, self.mesh = dtype, rngs, stored, mesh
