"""A folder with a draft, in either layout -> the draft. Only config.json and the safetensors beside it are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  lets safetensors return bfloat16 arrays
import numpy as np
from safetensors import SafetensorError, safe_open

from jeagle.errors import UserError
from jeagle.exchange.config_read import Hints, spec_from_config
from jeagle.exchange.limits import check_spec
from jeagle.exchange.names import EMBEDDING, TABLES, Params, canonical, check_embedding, from_torch
from jeagle.exchange.vocabulary import ids_of
from jeagle.joints import DraftSpec

_FLOATS = ("float32", "float16", "bfloat16")


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


def read_export(folder: str | Path, hints: Hints | None = None) -> ImportedDraft:
    """The draft in `folder`: an export of jeagle's, of SpecForge's or EAGLE's plain layout, or of speculators.

    Args:
      folder: with config.json and model.safetensors (or its shards).
      hints: answers to what the folder leaves open, as foreign ones may; none is needed for jeagle's own.

    Raises:
      UserError: for a missing or broken file, a tensor that is missing, unknown, wrongly shaped or not finite, a config
        that leaves a question open or that jeagle's draft cannot follow, or a map of ids that is not one.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = dict(_read_tensors(folder))
    tables = {name: tensors.pop(name) for name in TABLES if name in tensors}
    spec = spec_from_config(config, {name: array.shape for name, array in tensors.items()}, hints or Hints())
    check_spec(spec, target_layers=spec.taps[-1])
    where = str(folder)
    embed_VW = tables.get(EMBEDDING)
    embed_VW = None if embed_VW is None else embed_VW.astype(np.float32)
    check_embedding(spec, embed_VW, where=where)
    return ImportedDraft(spec, from_torch(spec, tensors, where=where), ids_of(spec, tables, where=where), embed_VW)


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
    return config


def _read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under its canonical name, once."""
    seen: set[str] = set()
    for path in _weight_files(folder):
        try:
            with safe_open(path, "numpy") as file:
                for torch_name in sorted(file.keys()):
                    name, array = canonical(torch_name), file.get_tensor(torch_name)
                    if name in seen:
                        raise UserError(f"{path}: {name} is there twice, as itself and as {torch_name}.")
                    if name not in TABLES[1:] and array.dtype.name not in _FLOATS:
                        raise UserError(f"{path}: {torch_name} is {array.dtype}; expected {', '.join(_FLOATS)}.")
                    seen.add(name)
                    yield name, array
        except (SafetensorError, OSError, AttributeError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}. Was it copied whole?") from error


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))
    if files:
        return files
    torch_files = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    hint = f": {torch_files[0].name} is torch's format, save it as safetensors first" if torch_files else ""
    raise UserError(f"{folder} holds no model.safetensors{hint}.")
