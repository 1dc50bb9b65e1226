"""Cutting a parameter's slices out of a checkpoint's tensors, and how each parameter lies on the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jeagle.errors import UserError
from jeagle.runtime.mesh import logical_sharding
from jeagle.targets.families import PREFIXES, Piece
from jeagle.targets.spec import BlockSpec
from jeagle.targets.weights import WeightSource

# Logical axes of every kernel (of its bias and scale: the last of them) and of every other large parameter, layers'
# leading stack axis left out. What is not here is whole on every device. The mesh axes behind them: runtime.mesh.RULES.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocab", "width"),
    "lm_head": ("vocab", "width"),
    "mixer.q_proj": ("width", "heads"),
    "mixer.k_proj": ("width", "heads"),
    "mixer.v_proj": ("width", "heads"),
    "mixer.z_proj": ("width", "heads"),
    "mixer.gate_proj": ("width", "heads"),
    "mixer.o_proj": ("heads", "width"),
    "mixer.q_a_proj": ("width", None),
    "mixer.q_b_proj": (None, "heads"),
    "mixer.kv_a_proj": ("width", None),
    "mixer.k_b_proj": (None, "heads"),
    "mixer.v_b_proj": (None, "heads"),
    "mlp.gate_proj": ("width", "mlp"),
    "mlp.up_proj": ("width", "mlp"),
    "mlp.down_proj": ("mlp", "width"),
    "shared.gate_proj": ("width", "mlp"),
    "shared.up_proj": ("width", "mlp"),
    "shared.down_proj": ("mlp", "width"),
    "experts.gate_proj": ("experts", "expert_width", "mlp"),
    "experts.up_proj": ("experts", "expert_width", "mlp"),
    "experts.down_proj": ("experts", "mlp", "expert_width"),
    "experts.gate_scale": ("experts", "mlp"),
    "experts.up_scale": ("experts", "mlp"),
    "experts.down_scale": ("experts", None),
    "experts.gate_bias": ("experts", "mlp"),
    "experts.up_bias": ("experts", "mlp"),
    "experts.down_bias": ("experts", None),
    "per_layer.embed": ("vocab", "width"),
    "per_layer.proj": ("width", None),
}


def sharding_of(key: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How the parameter `key` of this shape lies on the mesh."""
    parts = key.split(".")
    linear = parts[-1] in ("kernel", "bias", "scale")
    axes = AXES.get(".".join(parts[-3:-1] if linear else parts[-2:]))
    if linear and axes is not None and parts[-1] != "kernel":
        axes = axes[-1:]
    axes = (None,) * len(shape) if axes is None else (None,) * (len(shape) - len(axes)) + axes
    return NamedSharding(mesh, logical_sharding(axes, shape, mesh))


class Reader:
    """Cuts a parameter's slices out of a checkpoint's tensors."""

    def __init__(self, source: WeightSource, names: dict[str, Any], mesh: Mesh, dtype: Any):
        self.source, self.names, self.mesh, self.dtype = source, names, mesh, dtype
        self.present = set(source.names())
        self.prefix = next((p for p in PREFIXES if f"{p[0]}embed_tokens.weight" in self.present), PREFIXES[0])

    def load(self, key: str, shape: tuple[int, ...], block: BlockSpec | None, layers: Any) -> jax.Array:
        """An array of `shape`: of one layer (`layers` its number), of several stacked (a tuple), or of none (None)."""
        stack = isinstance(layers, tuple)
        own = shape[1:] if stack else shape
        numbers = layers if stack else (layers,)
        pieces = [self._piece(key, number) for number in numbers]
        for piece, number in zip(pieces, numbers, strict=True):
            self._check(piece, number, own, block)
        kind = self.dtype if len(own) > 1 and not key.endswith((".conv", "_bias")) else jnp.float32

        def one(place: int, index: tuple[slice, ...]) -> np.ndarray:
            return self._read(pieces[place], numbers[place], own, index, block).astype(kind)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if not stack:
                return one(0, index)
            return np.stack([one(place, index[1:]) for place in range(shape[0])[index[0]]])

        return jax.make_array_from_callback(shape, sharding_of(key, shape, self.mesh), read)

    def _piece(self, key: str, layer: int | None) -> Piece:
        if key not in self.names:
            raise UserError(f"The target's family does not say where its parameter {key} lies: add it to its names.")
        found = self.names[key]
        options = found if isinstance(found, tuple) else (found,)
        return next((p for p in options if self._name(p, layer, 0) in self.present), options[0])

    def _name(self, piece: Piece, layer: int | None, expert: int) -> str:
        name = piece.name.format(i=layer, e=expert)
        for plain, own in zip(PREFIXES[0], self.prefix, strict=True):
            if name.startswith(plain):
                return own + name.removeprefix(plain)
        return name

    def _check(self, piece: Piece, layer: int | None, own: tuple[int, ...], block: BlockSpec | None) -> None:
        """UserError unless every tensor is there and large enough."""
        each = "{e}" in piece.name
        wanted = self._theirs(own[1:] if each else own, piece)
        for expert in range(own[0] if each else 1):
            name = self._name(piece, layer, expert)
            if name not in self.present:
                raise UserError(f"The target's weights lack the tensor {name}: the download may be incomplete.")
            shape = tuple(self.source.shape(name))
            shape = tuple(n for n in shape if n != 1) if piece.squeeze else shape
            whole = list(shape)
            if piece.rows is not None and block is not None and len(shape) == len(wanted):
                axis = self._row_axis(piece, len(shape))
                if piece.rows(block).max() < shape[axis]:
                    whole[axis] = wanted[axis]
            squeezed = tuple(n for n in wanted if n != 1) if piece.squeeze else wanted
            if tuple(whole) != squeezed:
                raise UserError(f"The target's tensor {name} is {shape}; config.json makes it {wanted}.")

    def _theirs(self, shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
        if len(shape) < 2 or not piece.transposed:
            return shape
        return (*shape[:-2], shape[-1], shape[-2])

    def _row_axis(self, piece: Piece, rank: int) -> int:
        return rank - 2 if piece.transposed and rank > 1 else rank - 1

    def _read(
        self, piece: Piece, layer: int | None, own: tuple[int, ...], index: tuple[slice, ...], block: BlockSpec | None
    ) -> np.ndarray:
        if "{e}" in piece.name:
            experts = range(own[0])[index[0]]
            return np.stack([self._cut(piece, layer, e, own[1:], index[1:], block) for e in experts])
        return self._cut(piece, layer, 0, own, index, block)

    def _cut(
        self,
        piece: Piece,
        layer: int | None,
        expert: int,
        own: tuple[int, ...],
        index: tuple[slice, ...],
        block: BlockSpec | None,
    ) -> np.ndarray:
        name = self._name(piece, layer, expert)
        turned = piece.transposed and len(own) > 1
        where = [slice(*s.indices(n)[:2]) for s, n in zip(index, own, strict=True)]
        if turned:
            where[-2], where[-1] = where[-1], where[-2]
        taken: np.ndarray | None = None
        axis = self._row_axis(piece, len(own))
        if piece.rows is not None and block is not None:
            rows = piece.rows(block)[where[axis]]
            low = int(rows.min()) if len(rows) else 0
            where[axis], taken = slice(low, int(rows.max()) + 1 if len(rows) else 0), rows - low
        if piece.squeeze:
            part = self.source.read(name).squeeze().reshape(own)[tuple(where)]
        else:
            part = self.source.read(name, tuple(where))
        if taken is not None and not np.array_equal(taken, np.arange(part.shape[axis])):
            part = np.take(part, taken, axis=axis)
        part = np.swapaxes(part, -1, -2) if turned else part
        return part.astype(np.float32) + piece.plus if piece.plus else part
