"""The draft vocabulary's ids as engines keep them: offsets d2t, target id = i + d2t[i], and the mask t2d."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jeagle.errors import UserError
from jeagle.exchange.names import MASK, OFFSETS
from jeagle.interfaces import DraftSpec


def check_ids(spec: DraftSpec, draft_to_target_D: np.ndarray | None) -> np.ndarray:
    """The target id of each entry of the draft's vocabulary, int64 [D]; `None` is every id, for a full vocabulary.

    Raises:
      UserError: for a reduced vocabulary without a map, or ids that are not D, strictly rising and below V.
    """
    if draft_to_target_D is None:
        if spec.draft_vocab < spec.target_vocab:
            raise UserError(
                f"The draft's vocabulary has {spec.draft_vocab} entries of the target's {spec.target_vocab}, but there "
                "is no map of ids (d2t), so that an engine would take the first ids: give the one it was trained with."
            )
        return np.arange(spec.target_vocab, dtype=np.int64)
    ids_D = np.asarray(draft_to_target_D)
    if ids_D.shape != (spec.draft_vocab,) or ids_D.dtype.kind not in "iu":
        raise UserError(
            f"The draft's map of ids is {ids_D.dtype} {list(ids_D.shape)}; it needs {spec.draft_vocab} whole numbers."
        )
    ids_D = ids_D.astype(np.int64)
    if (np.diff(ids_D) <= 0).any() or ids_D[0] < 0 or ids_D[-1] >= spec.target_vocab:
        raise UserError(
            f"The draft's map of ids must rise strictly, from 0 or above, and stay below {spec.target_vocab}; it has "
            f"{ids_D.min()} to {ids_D.max()}. It holds the target's ids themselves, not their offsets (d2t)."
        )
    return ids_D


def tables_of(spec: DraftSpec, draft_to_target_D: np.ndarray | None) -> dict[str, np.ndarray]:
    """d2t (int64 offsets [D]) and t2d (bool [V]); neither for a full vocabulary.

    vLLM 0.32.0 has no parameter for the offsets of a full vocabulary and refuses a file that holds them; SGLang takes
    a missing map as the identity.

    Raises:
      UserError: as `check_ids`.
    """
    ids_D = check_ids(spec, draft_to_target_D)
    if spec.draft_vocab == spec.target_vocab:
        return {}
    mask_V = np.zeros(spec.target_vocab, dtype=bool)
    mask_V[ids_D] = True
    return {OFFSETS: ids_D - np.arange(spec.draft_vocab), MASK: mask_V}


def ids_of(spec: DraftSpec, tables: Mapping[str, np.ndarray], *, where: str) -> np.ndarray:
    """The inverse of `tables_of`: int64 [D]. Zero offsets with a full mask are taken for a full vocabulary too.

    Raises:
      UserError: for a missing map, absolute ids in place of offsets, or a mask that contradicts the offsets.
    """
    offsets_D, mask_V = tables.get(OFFSETS), tables.get(MASK)
    marked = None if mask_V is None else np.flatnonzero(mask_V)
    if offsets_D is not None and offsets_D.shape != (spec.draft_vocab,):
        raise UserError(f"{where}: d2t has shape {list(offsets_D.shape)}; config.json asks for [{spec.draft_vocab}].")
    if mask_V is not None and mask_V.shape != (spec.target_vocab,):
        raise UserError(f"{where}: t2d has shape {list(mask_V.shape)}; config.json asks for [{spec.target_vocab}].")
    rows_D = np.arange(spec.draft_vocab)
    if offsets_D is not None and marked is not None and not np.array_equal(offsets_D + rows_D, marked):
        if np.array_equal(offsets_D, marked):
            raise UserError(f"{where}: d2t holds target ids where engines want offsets: subtract the row numbers.")
        raise UserError(f"{where}: t2d does not mark the ids that d2t names; one of the two is of another draft.")
    return check_ids(spec, None if offsets_D is None else offsets_D + rows_D)
