"""Cutting a parameter's slices out of a checkpoint's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.checkpoint.layout import Layout
from jeagle.targets.checkpoint.weights import WeightSource
from jeagle.targets.families import PREFIXES, Piece
from jeagle.targets.model.spec import BlockSpec


class Reader:
    """Cuts a parameter's slices out of a checkpoint's tensors."""

    def __init__(self, source: WeightSource, names: dict[str, Any]):
        self.source, self.names = source, names
        self.present = set(source.names())
        self.prefix = next((p for p in PREFIXES if f"{p[0]}embed_tokens.weight" in self.present), PREFIXES[0])

    def read(self, layout: Layout, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the parameter of one layer, or of none; only its bytes are read, and in any type."""
        piece = self._piece(layout.key, layer)
        if not _each(piece):
            return self._cut(piece, layer, 0, layout.shape, index, layout.block)
        out = np.empty([part.stop - part.start for part in index], layout.dtype)
        for place, expert in enumerate(range(layout.shape[0])[index[0]]):
            out[place] = self._cut(piece, layer, expert, layout.shape[1:], index[1:], layout.block)
        return out

    def of_many(self, layout: Layout) -> bool:
        """Whether the parameter of one layer is many tensors: a mixture's experts, stored one by one."""
        return _each(self._piece(layout.key, layout.layers[0]))

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

    def check(self, layout: Layout, layer: int | None) -> None:
        """UserError unless every tensor of the parameter is there and large enough; reads none."""
        piece, own, block = self._piece(layout.key, layer), layout.shape, layout.block
        each = _each(piece)
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
                raise UserError(
                    f"The target's tensor {name} is {shape}; config.json makes it {wanted}: they belong to different "
                    "models, or a switch was edited."
                )

    def _theirs(self, shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
        if len(shape) < 2 or not piece.transposed:
            return shape
        return (*shape[:-2], shape[-1], shape[-2])

    def _row_axis(self, piece: Piece, rank: int) -> int:
        return rank - 2 if piece.transposed and rank > 1 else rank - 1

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
        where = list(index)
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


def _each(piece: Piece) -> bool:
    return "{e}" in piece.name
