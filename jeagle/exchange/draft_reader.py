"""Opens a folder with a draft that any known trainer or engine wrote: config.json, and the weights beside it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jeagle.errors import UserError
from jeagle.exchange.config_file import parse_config, to_common_form
from jeagle.exchange.config_read import Hints, spec_from_config
from jeagle.exchange.draft_tensors import (
    D2T,
    EMBEDDING,
    LM_HEAD,
    T2D,
    TABLES,
    LazyArray,
    check_embedding,
    check_finite,
    check_shapes,
    draft_vocabulary,
    expected_shapes,
    is_transposed,
    torch_name,
)
from jeagle.exchange.limits import check_spec
from jeagle.exchange.weight_files import open_tensors
from jeagle.interfaces import DraftSpec
from jeagle.runtime.host import aligned_empty

_ROWS = 512  # rows of a kernel that are transposed at a time


@dataclasses.dataclass(frozen=True)
class ImportedDraft:
    """A published draft in memory.

    Attributes:
      spec: from config.json, and from the tensors' shapes where it does not say something.
      params: by jeagle's names and in its orientation, float32.
      draft_to_target_D: the target's token id of each entry of the draft vocabulary, int64, strictly rising.
      embed_VW: the embedding that is stored with the draft, float32; None where the draft uses the target's.
    """

    spec: DraftSpec
    params: dict[str, np.ndarray]
    draft_to_target_D: Int[np.ndarray, " D"]
    embed_VW: Float[np.ndarray, "V W"] | None


def _parameter(tensor: LazyArray, *, transposed: bool, name: str, where: str) -> LazyArray:
    """Returns a parameter in jeagle's orientation, float32; `name` is the tensor's and `where` its folder."""

    def read_tensor(index: Any) -> np.ndarray:
        array = tensor[index]
        check_finite(name, array, where=where)
        return array.astype(np.float32, copy=False)

    def read_transposed(index: Any) -> np.ndarray:
        kernel = aligned_empty(tensor.shape[::-1], np.float32)
        for start in range(0, tensor.shape[0], _ROWS):  # the tensor as a whole would need as much memory again
            kernel[:, start : start + _ROWS] = read_tensor(slice(start, start + _ROWS)).T
        return kernel[index]

    return LazyArray(tensor.shape[::-1], read_transposed) if transposed else LazyArray(tensor.shape, read_tensor)


@dataclasses.dataclass(frozen=True)
class OpenDraft:
    """A draft in a folder whose tensors have not been read yet.

    Attributes:
      config: config.json in one of the two common forms.
      tensors: by canonical torch name, without those of `draft_tensors.TABLES`.
      tables: the tensors of `draft_tensors.TABLES` that the folder has.
      where: the folder, in error messages.
    """

    config: dict[str, Any]
    tensors: dict[str, LazyArray]
    tables: dict[str, LazyArray]
    where: str

    @property
    def lacks_head(self) -> bool:
        """Whether no lm_head is stored: such a draft shares the target's."""
        return LM_HEAD not in self.tensors

    def with_head(self, head_DW: Float[np.ndarray, "D W"]) -> OpenDraft:
        """Returns the same draft with this lm_head."""
        head = LazyArray(head_DW.shape, head_DW.__getitem__)
        return dataclasses.replace(self, tensors=self.tensors | {LM_HEAD: head})

    def spec(self, hints: Hints | None = None) -> DraftSpec:
        """Returns the draft's spec. Raises UserError where config.json leaves a question open that no hint answers."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        spec = spec_from_config(self.config, shapes, hints or Hints())
        check_spec(spec, target_layers=spec.aux_layers[-1])
        return spec

    def params(self, spec: DraftSpec) -> dict[str, LazyArray]:
        """Returns jeagle's parameters by name; each one is read when it is indexed.

        Raises:
          UserError: for a missing, unknown or wrongly shaped tensor, by its torch name; while it is read, for NaN.
        """
        if self.lacks_head:
            raise UserError(
                f"{self.where}: {LM_HEAD} is missing, so that an engine would use the target's: import the draft with "
                "converters/from_eagle3.py and --target, which adds these rows to it."
            )
        params: dict[str, LazyArray] = {}
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in expected_shapes(spec).items():
            stored, transposed = torch_name(name, "layers.0"), is_transposed(name, shape)
            expected[stored] = shape[::-1] if transposed else shape
            if stored in self.tensors:
                tensor = self.tensors[stored]
                params[name] = _parameter(tensor, transposed=transposed, name=stored, where=self.where)
        check_shapes(expected, self.tensors, where=self.where)
        return params

    def draft_to_target(self, spec: DraftSpec) -> Int[np.ndarray, " D"]:
        """Returns the token ids of the draft vocabulary, int64. Raises UserError for tables that are not valid."""
        d2t, t2d = (self.tables[name][...] if name in self.tables else None for name in (D2T, T2D))
        return draft_vocabulary(spec, d2t, t2d, where=self.where)

    def open_embedding(self, spec: DraftSpec) -> LazyArray | None:
        """Returns the embedding [V, W] that is stored with the draft, or None.

        Raises:
          UserError: for one that is missing and needed, or of another shape.
        """
        stored = self.tables.get(EMBEDDING)
        check_embedding(spec, None if stored is None else stored.shape, where=self.where)
        return None if stored is None else _parameter(stored, transposed=False, name=EMBEDDING, where=self.where)


def open_draft_folder(folder: str | Path) -> OpenDraft:
    """Opens the draft in `folder`, an export of jeagle's or what a trainer in `config_file` wrote.

    Args:
      folder: with config.json, and model.safetensors (or its parts) or pytorch_model.bin.

    Raises:
      UserError: for a missing or damaged file, or a config.json that is not of an EAGLE-3 draft.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} does not contain a draft: there is no config.json in it.")
    config = parse_config(folder / "config.json", name=str(folder / "config.json"))
    tensors = open_tensors(folder)
    tables = {name: tensors.pop(name) for name in TABLES if name in tensors}
    config = to_common_form(config, {name: tensor.shape for name, tensor in tensors.items()})
    if LM_HEAD not in tensors and not config.get("draft_vocab_size"):
        decoder = config.get("transformer_layer_config") or config
        config["draft_vocab_size"] = math.prod(tables[D2T].shape) if D2T in tables else decoder.get("vocab_size")
    return OpenDraft(config, tensors, tables, str(folder))


def read_draft(folder: str | Path, hints: Hints | None = None) -> ImportedDraft:
    """Reads the draft in `folder` into memory; see `open_draft_folder`.

    Args:
      hints: answers to the questions that the folder leaves open; an export of jeagle's needs none.

    Raises:
      UserError: for a missing or damaged file, a tensor that is missing, unknown, wrongly shaped or not finite, tables
        of ids that are not valid, or a config that leaves a question open or that jeagle's draft does not support.
    """
    draft = open_draft_folder(folder)
    spec = draft.spec(hints)
    embedding = draft.open_embedding(spec)
    params = {name: parameter[...] for name, parameter in draft.params(spec).items()}
    return ImportedDraft(spec, params, draft.draft_to_target(spec), None if embedding is None else embedding[...])
