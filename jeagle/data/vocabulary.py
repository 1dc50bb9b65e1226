"""Which tokens a draft can say, and the maps that servers read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.runtime.manifest import atomic_folder, differences, fingerprint, read_manifest, write_manifest
from jeagle.runtime.outputs import json_file, marked_folder

_FILES = ("d2t.npy", "t2d.npy", "counts.npy")
_MANIFEST = json_file("manifest of vocabulary tables", any_of=("ids", "draft_vocab", "given"))
TABLES = marked_folder("folder of vocabulary tables of jeagle's", "manifest.json", _MANIFEST, _FILES)


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
    """d2t.npy (int64 offsets: target id = i + d2t[i]), t2d.npy (bool [V]), counts.npy, and what they were made from.

    The manifest also names the ids, so that files of another vocabulary under it are seen.
    """
    in_draft = np.zeros(len(counts_V), bool)
    in_draft[draft_to_target_D] = True
    with atomic_folder(folder, TABLES) as aside:
        np.save(aside / "d2t.npy", draft_to_target_D.astype(np.int64) - np.arange(len(draft_to_target_D)))
        np.save(aside / "t2d.npy", in_draft)
        np.save(aside / "counts.npy", counts_V)
        write_manifest(aside, made_from | {"ids": ids_hash(draft_to_target_D)})


def ids_hash(draft_to_target_D: np.ndarray) -> str:
    """16 hex digits that name a draft vocabulary: of its ids, in order."""
    return fingerprint(np.asarray(draft_to_target_D).tolist())


def load_tables(folder: Path, made_from: dict[str, Any] | None = None) -> np.ndarray:
    """draft_to_target int32 [D] of a tables folder.

    Raises:
      UserError: when there is none, when it was made from other data than `made_from` says, or when its files
        contradict one another (ids where offsets belong, say).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no finished vocabulary tables: run python -m jeagle.prepare.")
    stated = manifest.get("ids")
    compared = [
        {n: v for n, v in (tree or {}).items() if n != "ids" or "ids" in (made_from or {})}
        for tree in (manifest, made_from)
    ]
    if made_from is not None and (fields := differences(*compared)):
        raise UserError(
            f"The vocabulary in {folder} was made from other data ({', '.join(fields)} differ): prepare anew."
        )
    ids = _read_map(folder / "d2t.npy", folder / "t2d.npy", f"The vocabulary in {folder}")
    if stated is not None and stated != ids_hash(ids):
        raise UserError(
            f"The vocabulary in {folder} is not the one that its manifest names: put it back, or prepare anew."
        )
    return ids


def given_map(path: Path, draft_vocab: int, target_vocab: int, end_token_ids: Sequence[int]) -> np.ndarray:
    """A draft vocabulary that someone else chose, kept as it is: int32 [D] token ids.

    Args:
      path: a folder with d2t.npy and t2d.npy (or speculators' d2t-D.npy and t2d-D.npy), a run, a draft's folder whose
        model.safetensors holds both, or a d2t file with its t2d beside it.
      draft_vocab: D that the draft is to have.

    Raises:
      UserError: when there is none, it contradicts itself, or it is of another target or another size.
    """
    where = f"The vocabulary {path}"
    ids = _find_map(path, where)
    if len(ids) != draft_vocab and not (draft_vocab <= 0 and len(ids) == target_vocab):
        raise UserError(f"{where} has {len(ids)} tokens, but --draft.vocab is {draft_vocab}: make it {len(ids)}.")
    if int(ids[-1]) >= target_vocab:
        raise UserError(f"{where} names token {ids[-1]}, but the target has {target_vocab}: it is of another target.")
    if len(end_token_ids) and not np.isin(list(end_token_ids), ids).any():
        raise UserError(
            f"{where} has none of the end tokens {', '.join(map(str, end_token_ids))}: a draft could never end an "
            "answer. It is of another target, or was made without them."
        )
    return ids


def _find_map(path: Path, where: str) -> np.ndarray:
    if path.is_file():
        return _read_map(path, path.with_name(path.name.replace("d2t", "t2d")), where)
    if (path / "tables").is_dir():
        path = path / "tables"
    if found := sorted(path.glob("d2t*.npy")):
        if len(found) > 1:
            raise UserError(f"{path} holds {len(found)} maps: name one of them, such as {found[0]}.")
        return _read_map(found[0], found[0].with_name(found[0].name.replace("d2t", "t2d")), where)
    if (weights := path / "model.safetensors").is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(weights, "numpy") as file:
                tensors = {name: file.get_tensor(name) for name in ("d2t", "t2d") if name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights} cannot be read ({error}): copy it again.") from error
        if "d2t" in tensors:
            return _check_map(tensors["d2t"], tensors.get("t2d"), where)
    raise UserError(f"{where} is nowhere: give a folder with d2t.npy and t2d.npy, a run, or a draft's folder.")


def _read_map(offsets: Path, mask: Path, where: str) -> np.ndarray:
    try:
        return _check_map(np.load(offsets), np.load(mask) if mask.is_file() else None, where)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{where} cannot be read ({error}): make it anew, or copy it again.") from error


def _check_map(offsets: np.ndarray, in_draft: np.ndarray | None, where: str) -> np.ndarray:
    """Ids of offsets [D] and a mask [V]. UserError unless the ids rise, and are those that the mask marks."""
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise UserError(f"{where}: d2t is {offsets.dtype} {list(offsets.shape)}; it must be a list of whole numbers.")
    ids = np.arange(len(offsets)) + offsets.astype(np.int64)
    marked = None if in_draft is None else np.flatnonzero(in_draft)
    if marked is None and not offsets.any():
        raise UserError(f"{where}: d2t is all zeros and there is no t2d: that names the first tokens, used or not.")
    if np.any(np.diff(ids) <= 0) or ids[0] < 0 or (marked is not None and not np.array_equal(ids, marked)):
        raise UserError(
            f"{where}: d2t.npy and t2d.npy contradict each other, or d2t does not rise: d2t holds offsets, "
            "id = i + d2t[i], and t2d marks those ids. Mend them; the tables/ of a run are made anew once removed."
        )
    return ids.astype(np.int32)
