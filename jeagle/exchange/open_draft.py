"""A folder with a draft, in any dialect -> the draft. Only config.json and the weights beside it are read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.exchange.config_kinds import check_kinds
from jeagle.exchange.config_read import Hints, spec_from_config
from jeagle.exchange.dialects import as_common
from jeagle.exchange.limits import check_spec
from jeagle.exchange.names import (
    EMBEDDING,
    HEAD,
    OFFSETS,
    TABLES,
    Params,
    check_embedding,
    check_finite,
    check_names,
    expected_shapes,
    is_kernel,
    text,
    torch_name,
)
from jeagle.exchange.tensors import Tensor, open_tensors
from jeagle.exchange.vocabulary import ids_of
from jeagle.interfaces import DraftSpec
from jeagle.runtime.host import aligned_empty


@dataclasses.dataclass(frozen=True)
class ImportedDraft:
    """A draft as it lies in a folder.

    Attributes:
      spec: from config.json, and the shapes of tensors where it is silent.
      params: jeagle's names and orientation, float32.
      draft_to_target_D: target id of each entry of the draft's vocabulary, int64, strictly rising.
      embed_VW: the embedding stored with the draft, float32; None where the target's serves.
    """

    spec: DraftSpec
    params: Params
    draft_to_target_D: np.ndarray
    embed_VW: np.ndarray | None


_ROWS = 512  # of a kernel at a time


class Lazy:
    """A parameter, float32, that is read from its file each time that it is indexed: `[...]`, or `[start:stop]`."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], *, turned: bool, name: str, where: str):
        self.shape = shape
        self._tensor, self._turned, self._name, self._where = tensor, turned, name, where

    def __getitem__(self, index: Any) -> np.ndarray:
        if not self._turned:
            array = self._tensor.read(index)
            check_finite(self._name, array, where=self._where)
            return array.astype(np.float32, copy=False)
        turned = aligned_empty(self.shape, np.float32)
        for start in range(0, self.shape[1], _ROWS):  # all of it at once would be as large as the result
            rows = self._tensor.read(slice(start, start + _ROWS))
            check_finite(self._name, rows, where=self._where)
            turned[:, start : start + _ROWS] = rows.T
        return turned[index]


@dataclasses.dataclass(frozen=True)
class OpenDraft:
    """A draft in a folder whose parameters are still to be read.

    Attributes:
      config: config.json in one of the two common forms, whichever dialect it came in.
      tensors: all but `names.TABLES`, by canonical torch name.
      tables: those, by the same.
      where: the folder, for errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tables: dict[str, Tensor]
    where: str

    @property
    def lacks_head(self) -> bool:
        """Whether no lm_head is stored: such a draft shares its target's."""
        return HEAD not in self.tensors

    def with_head(self, head_DW: np.ndarray) -> OpenDraft:
        """The same draft with this lm_head."""
        return dataclasses.replace(self, tensors=self.tensors | {HEAD: Tensor(head_DW.shape, head_DW.__getitem__)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def spec(self, hints: Hints | None = None) -> DraftSpec:
        """UserError where config.json leaves a question open that `hints` do not answer."""
        spec = spec_from_config(self.config, self.shapes, hints or Hints())
        check_spec(spec, target_layers=spec.aux_layers[-1])
        return spec

    def params(self, spec: DraftSpec) -> dict[str, Lazy]:
        """jeagle's parameters, float32, each read when it is indexed.

        Raises:
          UserError: for a missing, unknown or wrongly shaped tensor by its torch name; when it is read, for NaN.
        """
        if self.lacks_head:
            raise UserError(
                f"{self.where}: {HEAD} is missing, so that an engine would take the target's: take the draft in with "
                "converters/from_eagle3.py and --target, which puts those rows there."
            )
        expected = {torch_name(name, "layers.0"): (name, shape) for name, shape in expected_shapes(spec).items()}
        check_names(expected, self.tensors, where=self.where)
        params = {}
        for named, (name, shape) in expected.items():
            tensor, turned = self.tensors[named], is_kernel(name, shape)
            wanted = shape[::-1] if turned else shape
            if tensor.shape != wanted:
                raise UserError(f"{self.where}: {named} is {text(tensor.shape)}; config.json asks for {text(wanted)}.")
            params[name] = Lazy(tensor, shape, turned=turned, name=named, where=self.where)
        return params

    def draft_to_target(self, spec: DraftSpec) -> np.ndarray:
        """The vocabulary's ids, int64 [D]. UserError where the tables are none."""
        tables = {name: tensor.read(...) for name, tensor in self.tables.items() if name != EMBEDDING}
        return ids_of(spec, tables, where=self.where)

    def open_embedding(self, spec: DraftSpec) -> Lazy | None:
        """The embedding stored with the draft, [V, W], read as `params` are. UserError where it is missing and needed,
        or of another shape."""
        stored = self.tables.get(EMBEDDING)
        check_embedding(spec, None if stored is None else stored.shape, where=self.where)
        if stored is None:
            return None
        return Lazy(stored, stored.shape, turned=False, name=EMBEDDING, where=self.where)


def open_draft(folder: str | Path) -> OpenDraft:
    """The draft in `folder`, its parameters unread.

    Raises:
      UserError: for a missing or broken file, or a config.json of no EAGLE-3 draft.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = open_tensors(folder)
    tables = {name: tensors.pop(name) for name in TABLES if name in tensors}
    common = as_common(config, {n: t.shape for n, t in tensors.items()})
    if HEAD not in tensors and not common.get("draft_vocab_size"):
        decoder = common.get("transformer_layer_config") or common
        counted = math.prod(tables[OFFSETS].shape) if OFFSETS in tables else decoder.get("vocab_size")
        common = common | {"draft_vocab_size": counted}
    return OpenDraft(common, tensors, tables, str(folder))


def read_export(folder: str | Path, hints: Hints | None = None) -> ImportedDraft:
    """The draft in `folder`, whole: an export of jeagle's, or what any of the dialects in `dialects` published.

    Args:
      folder: with config.json and model.safetensors (or its shards), or pytorch_model.bin.
      hints: answers to what the folder leaves open, as foreign ones may; none is needed for jeagle's own.

    Raises:
      UserError: for a missing or broken file, a tensor that is missing, unknown, wrongly shaped or not finite, a config
        that leaves a question open or that jeagle's draft cannot follow, or a map of ids that is not one.
    """
    draft = open_draft(folder)
    spec = draft.spec(hints)
    embedding = draft.open_embedding(spec)
    params = loaded(draft.params(spec))
    return ImportedDraft(spec, params, draft.draft_to_target(spec), None if embedding is None else embedding[...])


def loaded(params: Mapping[str, Lazy]) -> Params:
    """The same parameters in memory."""
    return {name: parameter[...] for name, parameter in params.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no draft: there is no config.json in it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration, but a {type(config).__name__}.")
    check_kinds(config)
    return config
