"""The values of a GGUF's header, with a record of which were read: what is not honoured must not pass unseen."""

from __future__ import annotations

from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.targets.gguf.reader import Gguf

_REQUIRED = object()
# Keys that change no number that jeagle computes: sizes that the tensors' shapes say again, and notes of the converter.
IMMATERIAL = {
    "attention.causal",
    "attention.value_length",
    "context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
}


class Metadata:
    """Values under the architecture's own prefix."""

    def __init__(self, opened: Gguf):
        self.path, self.header, self.tensors = opened.path, opened.metadata, opened.tensors
        self.architecture = str(opened.metadata.get("general.architecture"))
        self._read: set[str] = set()

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        """One number or text; a list whose entries agree counts as one. UserError where it is missing or differs."""
        found = self.each(key, default)
        if isinstance(found, list):
            if len(set(found)) != 1:
                raise UserError(f"The target {self.path} has another {key} in each layer, which is not supported.")
            found = found[0]
        return shortest(found) if isinstance(found, float) else found

    def each(self, key: str, default: Any = _REQUIRED) -> Any:
        """As it stands in the file: one value, or one for each layer."""
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        found = self.header.get(name, default)
        if found is _REQUIRED:
            raise UserError(f"The target {self.path} lacks the metadata {name}: convert it again.")
        return found

    def vector(self, tensor: str) -> list[float]:
        """The numbers of a small tensor, as short decimals."""
        stored = self.tensors[tensor]
        return [shortest(float(x)) for x in stored.read((slice(0, stored.shape[0]),))]

    def rows(self, tensor: str) -> int:
        """How many rows a tensor has. UserError if it is not there."""
        if tensor not in self.tensors:
            raise UserError(f"The target {self.path} has no tensor {tensor}: is its download complete?")
        return self.tensors[tensor].shape[0]

    def refuse_unread(self) -> None:
        """UserError for a key of this architecture that nothing has asked for."""
        prefix = self.architecture + "."
        known = self._read | {prefix + key for key in IMMATERIAL}
        for name, value in sorted(self.header.items()):
            if name.startswith(prefix) and name not in known and value not in (0, False):
                shown = value[:4] if isinstance(value, list) else value
                raise UserError(
                    f"The target {self.path} has the metadata {name} = {shown}, which jeagle does not honour for this "
                    "architecture: give the model's safetensors folder instead."
                )


def shortest(value: float) -> float:
    """The decimal that was stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
