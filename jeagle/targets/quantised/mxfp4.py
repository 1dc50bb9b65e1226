"""MXFP4 experts as gpt-oss is published: two numbers of four bits a byte, and an exponent for each 32 of them.

Source: the OCP Microscaling specification (E2M1 with E8M0 scales); transformers' integrations/mxfp4.py for the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.quantised.storage import StoredArray
from jeagle.targets.quantised.views import Index, Swapped, View

_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_VALUES, -_VALUES])
_BYTES, _GROUP, _BIAS = 16, 32, 127


@dataclass(frozen=True)
class Mxfp4:
    """A View of [..., rows, groups * 32] in bfloat16, which holds every such number exactly.

    Attributes:
      blocks: uint8 [..., rows, groups, 16]; the low half of a byte comes first.
      scales: uint8 [..., rows, groups], exponents of two plus 127.
    """

    blocks: StoredArray
    scales: StoredArray
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, groups, _ = self.blocks.shape
        return (*lead, groups * _GROUP)

    def read(self, index: Index) -> np.ndarray:
        *lead, columns = index
        groups = slice(columns.start // _GROUP, -(-columns.stop // _GROUP))
        packed = self.blocks.read((*lead, groups, slice(0, _BYTES)))
        exponents = self.scales.read((*lead, groups)).astype(np.int32) - _BIAS
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], _GROUP)
        numbers = np.ldexp(_VALUES[halves], exponents[..., None]).astype(self.dtype)
        numbers = numbers.reshape(*packed.shape[:-2], packed.shape[-2] * _GROUP)
        start = columns.start - groups.start * _GROUP
        return numbers[..., start : start + columns.stop - columns.start]


def experts(blocks: StoredArray, scales: StoredArray) -> View:
    """The weight of an unquantised checkpoint, gate_up_proj [E, H, 2F] or down_proj [E, F, H]: the transpose.

    Raises:
      UserError: where shapes or types are not those of MXFP4.
    """
    right = blocks.shape[-1:] == (_BYTES,) and blocks.shape[:-1] == scales.shape
    if not right or {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}:
        raise UserError(
            f"The tensors {blocks.name} {blocks.shape} and {scales.name} {scales.shape} in {blocks.path} are not "
            f"MXFP4's [..., {_BYTES}] and [...] of bytes: download the model again."
        )
    return Swapped(Mxfp4(blocks, scales))
