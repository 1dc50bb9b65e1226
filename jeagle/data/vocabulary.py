"""Which tokens a draft can say, and the maps that servers read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.joints import Batch
from jeagle.runtime.manifest import atomic_folder, differences, read_manifest, write_manifest


def count_tokens(rows: Batch, vocab: int) -> np.ndarray:
    """How often each target token is supervised: int64 [V]. UserError where a token's id is not below V."""
    tokens_BT = np.asarray(rows.tokens_BT)
    if (highest := int(tokens_BT.max(initial=0))) >= vocab:
        raise UserError(
            f"The tokenizer gives id {highest}, but the target's vocabulary has {vocab}: "
            "its tokenizer and its weights do not belong together."
        )
    return np.bincount(tokens_BT[np.asarray(rows.supervised_BT)], minlength=vocab).astype(np.int64)


def choose(counts_V: np.ndarray, size: int, forced_ids: Sequence[int]) -> np.ndarray:
    """The draft vocabulary: int32 [D] token ids, rising.

    The forced ids (end tokens: a draft that cannot say them misses every turn's end), then the most frequent; ties go
    to the lower id. A size of 0, or at least V, is the whole vocabulary.
    """
    if size <= 0 or size >= len(counts_V):
        return np.arange(len(counts_V), dtype=np.int32)
    order = np.lexsort((np.arange(len(counts_V)), -counts_V))
    forced = np.unique(np.asarray(forced_ids, np.int64))
    if len(forced) and forced[-1] >= len(counts_V):
        raise UserError(f"The end token {forced[-1]} is not below the target's vocabulary of {len(counts_V)}.")
    if len(forced) > size:
        raise UserError(f"--draft.vocab {size} has no room for the {len(forced)} end tokens.")
    rest = order[~np.isin(order, forced)][: size - len(forced)]
    return np.sort(np.concatenate([forced, rest])).astype(np.int32)


def coverage(counts_V: np.ndarray, draft_to_target_D: np.ndarray) -> float:
    """Share of supervised tokens that the draft can say."""
    return float(counts_V[draft_to_target_D].sum() / max(counts_V.sum(), 1))


def save_tables(folder: Path, counts_V: np.ndarray, draft_to_target_D: np.ndarray, made_from: dict[str, Any]) -> None:
    """d2t.npy (int64 offsets: target id = i + d2t[i]), t2d.npy (bool [V]), counts.npy, and what they were made from."""
    in_draft = np.zeros(len(counts_V), bool)
    in_draft[draft_to_target_D] = True
    with atomic_folder(folder) as aside:
        np.save(aside / "d2t.npy", draft_to_target_D.astype(np.int64) - np.arange(len(draft_to_target_D)))
        np.save(aside / "t2d.npy", in_draft)
        np.save(aside / "counts.npy", counts_V)
        write_manifest(aside, made_from)


def load_tables(folder: Path, made_from: dict[str, Any] | None = None) -> np.ndarray:
    """draft_to_target int32 [D] of a tables folder.

    Raises:
      UserError: when there is none, when it was made from other data than `made_from` says, or when its files
        contradict one another (ids where offsets belong, say).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no finished vocabulary tables: run python -m jeagle.prepare.")
    if made_from is not None and (fields := differences(manifest, made_from)):
        raise UserError(
            f"The vocabulary in {folder} was made from other data ({', '.join(fields)} differ): prepare anew."
        )
    try:
        offsets, in_draft = np.load(folder / "d2t.npy"), np.load(folder / "t2d.npy")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The vocabulary in {folder} cannot be read ({error}): remove it and prepare anew.") from error
    ids = np.arange(len(offsets)) + offsets
    if not (np.all(np.diff(ids) > 0) and np.array_equal(ids, np.flatnonzero(in_draft))):
        raise UserError(f"d2t.npy and t2d.npy in {folder} contradict each other: d2t holds offsets, id = i + d2t[i].")
    return ids.astype(np.int32)
