"""The values of a GGUF's header; a key that was not read is refused, since it may change the model's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.gguf.reader import GgufFile

_REQUIRED = object()
# Keys that change no number: sizes that follow from the tensors' shapes, and notes of the converter.
IMMATERIAL = {
    "attention.causal",
    "attention.value_length",
    "context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
}


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
