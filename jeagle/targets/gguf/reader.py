"""Reads GGUF files: the values of their headers, slices of their tensors, and files that are split into parts.

Source: the GGUF specification of ggml. The gguf package decodes the block formats.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES

from jeagle.errors import UserError
from jeagle.targets.checkpoint.reference import gguf_parts
from jeagle.targets.quantised.views import Index, StoredArray

_AT_ONCE = 1 << 20  # bytes of blocks that are decoded at a time


@dataclass(frozen=True)
class GgufFile:
    """A model's header and tensors, from one file or from several parts.

    Attributes:
      path: the file, or the first of its parts.
      metadata: the header's entries, numbers, texts or lists of them (of the first part where it is split).
      tensors: the tensors by name, none of which is read yet.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


@dataclass(frozen=True)
class GgufTensor:
    """A view of one tensor of a file, decoded to float32 in complete blocks.

    Attributes:
      blocks: the tensor's bytes, [..., bytes of a row].
      kind: the format of its blocks.
    """

    blocks: StoredArray
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)

    def read(self, index: Index) -> np.ndarray:
        *lead, columns = index
        block, size = GGML_QUANT_SIZES[self.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        blocks = self.blocks.read((*lead, slice(first * size, last * size)))
        out = np.empty((*blocks.shape[:-1], columns.stop - columns.start), np.float32)
        if not out.size:
            return out
        rows, flat = blocks.reshape(-1, blocks.shape[-1]), out.reshape(-1, out.shape[-1])
        step = max(1, _AT_ONCE // rows.shape[1])
        for row in range(0, len(rows), step):  # the package needs twice the memory of what it decodes
            decoded = gguf.quants.dequantize(rows[row : row + step], self.kind)
            flat[row : row + step] = decoded[:, columns.start - first * block : columns.stop - first * block]
        return out


def open_gguf(path: Path) -> GgufFile:
    """Opens a GGUF; its header is cached, since weights and tokenizer both need it.

    Args:
      path: the file, or any of its parts.

    Raises:
      UserError: for a file that is not GGUF or is cut short, naming the tensor where it ends, or for a missing part.
    """
    parts = gguf_parts(path)
    status = [part.stat() for part in parts]
    return _open_gguf(parts, tuple((s.st_size, s.st_mtime_ns) for s in status))


@functools.lru_cache(maxsize=2)
def _open_gguf(parts: tuple[Path, ...], _stamps: tuple[tuple[int, int], ...]) -> GgufFile:
    readers = [_read(part) for part in parts]
    metadata = {name: field.contents() for name, field in readers[0].fields.items()}
    tensors: dict[str, GgufTensor] = {}
    for part, reader in zip(parts, readers, strict=True):
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            block, size = GGML_QUANT_SIZES[tensor.tensor_type]
            rows = (*shape[:-1], shape[-1] // block * size)
            blocks = StoredArray(part, tensor.name, int(tensor.data_offset), rows, np.dtype(np.uint8))
            tensors[tensor.name] = GgufTensor(blocks, tensor.tensor_type, shape)
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise UserError(f"The target {parts[0]} and its parts hold {len(tensors)} tensors of {expected}: get it again.")
    for kind, example in {tensor.kind: tensor for tensor in tensors.values()}.items():
        try:  # one block of each type
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"The target's tensor {example.blocks.name} in {example.blocks.path} is of type {kind.name}, which the "
                "gguf package cannot decode: give another quantisation of the model."
            ) from error
    return GgufFile(parts[0], metadata, tensors)


def _read(path: Path) -> GGUFReader:
    try:
        reader = _Reader(path)
    except UserError:
        raise
    except Exception as error:  # the package raises any error of numpy's where the header is damaged
        if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise UserError(
                f"The target {path} holds tensors of type number {unknown[1]}, which the gguf package does not know: "
                "give another quantisation of the model."
            ) from error
        raise UserError(f"The target {path} is not a complete GGUF file ({error}): download it again.") from error
    if reader.byte_order != "I":
        raise UserError(f"The target {path} is a GGUF in big-endian byte order, which is not supported: convert it.")
    return reader


class _Reader(GGUFReader):
    """A GGUFReader that reads an array at once, where the base class spends seconds on a vocabulary, and that names the
    tensor at which a file is cut short."""

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        types, start, count = [GGUFValueType.ARRAY, GGUFValueType(kind[0])], orig_offs + 12, int(length[0])
        if types[1] == GGUFValueType.STRING:
            data, texts, end = self.data.data, [], start
            for _ in range(count):
                first = end + 8
                end = first + int.from_bytes(data[end:first], "little")
                if end > len(data):
                    raise ValueError("its header is cut short")
                texts.append(data[first:end])
            return end - orig_offs, [kind, length, *texts], list(range(2, 2 + count)), types
        if types[1] not in self.gguf_scalar_to_np:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(start, self.gguf_scalar_to_np[types[1]], count)
        if len(values) < count:
            raise ValueError("its header is cut short")
        return 12 + int(values.nbytes), [kind, length, values], [2], types

    def _build_tensors(self, start_offs: Any, fields: list[Any]) -> None:
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
            end = start_offs + int(offset[0]) + int(np.prod(dims)) // block * block_bytes
            if end > (size := len(self.data)):
                raise UserError(
                    f"The target {self.data.filename} is cut short at its tensor {bytes(name).decode()} ({size} bytes "
                    f"of at least {end}): download it again."
                )
        super()._build_tensors(start_offs, fields)


_REQUIRED = object()
# Keys that change no number: sizes that follow from the tensors' shapes, and notes of the converter.
IMMATERIAL = {"attention.causal", "attention.value_length", "context_length", "rope.scaling.finetuned"}
IMMATERIAL |= {"tensor_data_layout", "vocab_size"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_TEXTS = {"rope.scaling.type": lambda value: isinstance(value, str)}
"""Keys whose value is a text; those of all others are numbers, or lists of them."""


class Metadata:
    """The values of the keys with the architecture's prefix."""

    def __init__(self, opened: GgufFile):
        self.path, self.header, self.tensors = opened.path, opened.metadata, opened.tensors
        self.architecture = str(opened.metadata.get("general.architecture"))
        self._read: set[str] = set()

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a number or text; of a list with one entry for each layer, the common value.

        Raises:
          UserError: if the key is missing and has no default, or if the layers differ.
        """
        value = self.each(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"The target {self.path} has different {key} in its layers, which is not supported.")
            value = value[0]
        return shortest(value) if isinstance(value, float) else value

    def each(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns the value as it is in the file: one value, or one for each layer."""
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        value = self.header.get(name, default)
        if value is _REQUIRED:
            raise UserError(f"The target {self.path} lacks the metadata {name}: convert it again.")
        right, values = _TEXTS.get(key, _is_number), value if isinstance(value, list) else [value]
        if value is not default and not all(map(right, values)):
            kind = "a text" if key in _TEXTS else "a number"
            raise UserError(f"The target {self.path} has the metadata {name} = {value!r}; it must be {kind}.")
        return value

    def vector(self, tensor: str) -> list[float]:
        """Returns the numbers of a small tensor, as `shortest` decimals."""
        stored = self.tensors[tensor]
        return [shortest(float(x)) for x in stored.read((slice(0, stored.shape[0]),))]

    def rows(self, tensor: str) -> int:
        """Returns the number of a tensor's rows. Raises UserError if the tensor is missing."""
        if tensor not in self.tensors:
            raise UserError(f"The target {self.path} has no tensor {tensor}: is its download complete?")
        return self.tensors[tensor].shape[0]

    def refuse_unread(self) -> None:
        """Raises UserError for a key of this architecture that was not read."""
        prefix = self.architecture + "."
        known = self._read | {prefix + key for key in IMMATERIAL}
        for name, value in sorted(self.header.items()):
            if name.startswith(prefix) and name not in known and value not in (0, False):
                shown = value[:4] if isinstance(value, list) else value
                raise UserError(
                    f"The target {self.path} has the metadata {name} = {shown}, which jeagle does not support for this "
                    "architecture: give the model's safetensors folder instead."
                )


def shortest(value: float) -> float:
    """Returns the shortest decimal of a float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))
