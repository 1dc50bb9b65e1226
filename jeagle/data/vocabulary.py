"""The draft vocabulary: which tokens the draft can predict, and the maps (d2t, t2d) that servers read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped

from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.runtime.manifest import atomic_folder, differences, fingerprint, read_manifest, write_manifest
from jeagle.runtime.outputs import json_file, marked_folder

_FILES = ("d2t.npy", "t2d.npy", "counts.npy")
_MANIFEST = json_file("manifest of vocabulary tables", any_of=("ids", "draft_vocab", "given"))
TABLES = marked_folder("folder of vocabulary tables of jeagle's", "manifest.json", _MANIFEST, _FILES)


def count_supervised(rows: Batch, vocab: int) -> Int64[np.ndarray, " V"]:
    """Counts how often each target token is supervised in rows [B, T].

    Args:
      vocab: V.

    Raises:
      UserError: if a token id is V or greater.
    """
    tokens_BT = np.asarray(rows.tokens_BT)
    if (highest := int(tokens_BT.max(initial=0))) >= vocab:
        raise UserError(
            f"The tokenizer gives id {highest}, but the target's vocabulary has {vocab} tokens: the tokenizer and the "
            "weights do not belong together."
        )
    return np.bincount(tokens_BT[np.asarray(rows.supervised_BT)], minlength=vocab).astype(np.int64)


def choose_vocabulary(counts_V: Int[np.ndarray, " V"], size: int, forced_ids: Sequence[int]) -> Int32[np.ndarray, " D"]:
    """Chooses the draft vocabulary: the forced ids, and then the most frequent tokens.

    Args:
      counts_V: how often each token is supervised; of equally frequent tokens the lower id is chosen.
      size: D; 0, or a value of at least V, gives the whole vocabulary.
      forced_ids: end tokens, because a draft that cannot predict them fails at the end of every turn.

    Returns:
      Token ids, rising.

    Raises:
      UserError: if D is too small for the forced ids, or if one of them is V or greater.
    """
    if size <= 0 or size >= len(counts_V):
        return np.arange(len(counts_V), dtype=np.int32)
    order = np.lexsort((np.arange(len(counts_V)), -counts_V))
    forced = np.unique(np.asarray(forced_ids, np.int64))
    if len(forced) and forced[-1] >= len(counts_V):
        raise UserError(f"The end token {forced[-1]} is not in the target's vocabulary of {len(counts_V)} tokens.")
    if len(forced) > size:
        raise UserError(f"--draft.vocab {size} is too small for the {len(forced)} end tokens: raise it.")
    rest = order[~np.isin(order, forced)][: size - len(forced)]
    return np.sort(np.concatenate([forced, rest])).astype(np.int32)


def coverage(counts_V: Int[np.ndarray, " V"], draft_to_target_D: Int[np.ndarray, " D"]) -> float:
    """Returns the share of supervised tokens, 0 to 1, that are in the draft vocabulary."""
    return float(counts_V[draft_to_target_D].sum() / max(counts_V.sum(), 1))


def save_tables(
    folder: Path, counts_V: Int[np.ndarray, " V"], draft_to_target_D: Int[np.ndarray, " D"], made_from: dict[str, Any]
) -> None:
    """Saves a draft vocabulary: d2t.npy (int64 offsets, target id = i + d2t[i]), t2d.npy (bool [V]) and counts.npy.

    The manifest holds `made_from` and a hash of the ids, so that files of another vocabulary are recognised.
    """
    in_draft = np.zeros(len(counts_V), bool)
    in_draft[draft_to_target_D] = True
    with atomic_folder(folder, TABLES) as partial:
        np.save(partial / "d2t.npy", draft_to_target_D.astype(np.int64) - np.arange(len(draft_to_target_D)))
        np.save(partial / "t2d.npy", in_draft)
        np.save(partial / "counts.npy", counts_V)
        write_manifest(partial, made_from | {"ids": vocabulary_hash(draft_to_target_D)})


def vocabulary_hash(draft_to_target_D: Int[np.ndarray, " D"]) -> str:
    """Returns 16 hex digits that follow from the ids of a draft vocabulary, in order."""
    return fingerprint(np.asarray(draft_to_target_D).tolist())


def load_tables(folder: Path, made_from: dict[str, Any] | None = None) -> Int32[np.ndarray, " D"]:
    """Loads the token ids of a draft vocabulary that `save_tables` saved.

    Raises:
      UserError: if there is no such folder, if it was made from other data than `made_from` says, or if its files
        contradict each other (for example, if d2t holds ids instead of offsets).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no complete vocabulary tables: run python -m jeagle.prepare.")
    if made_from is not None:
        old = manifest if "ids" in made_from else {name: v for name, v in manifest.items() if name != "ids"}
        if fields := differences(old, made_from):
            raise UserError(
                f"The vocabulary in {folder} was made from other data ({', '.join(fields)} differ): prepare it again."
            )
    ids = _read_map(folder / "d2t.npy", f"The vocabulary in {folder}")
    if manifest.get("ids", vocabulary_hash(ids)) != vocabulary_hash(ids):
        raise UserError(
            f"The vocabulary in {folder} is not the one that its manifest names: restore it, or prepare it again."
        )
    return ids


def load_given_vocabulary(
    path: Path, draft_vocab: int, target_vocab: int, end_token_ids: Sequence[int]
) -> Int32[np.ndarray, " D"]:
    """Loads a draft vocabulary that the user gives, which is used unchanged.

    Args:
      path: a folder with d2t.npy and t2d.npy (or speculators' d2t-D.npy and t2d-D.npy), a run, a draft's folder whose
        model.safetensors contains both, or a d2t file with its t2d file beside it.
      draft_vocab: D, as the configuration says.
      target_vocab: V.
      end_token_ids: at least one of them must be in the vocabulary.

    Returns:
      Token ids, rising.

    Raises:
      UserError: if there is no vocabulary, if its files contradict each other, or if it belongs to another target or
        has another size.
    """
    where = f"The vocabulary {path}"
    ids = _find_map(path, where)
    if len(ids) != draft_vocab and not (draft_vocab <= 0 and len(ids) == target_vocab):
        raise UserError(f"{where} has {len(ids)} tokens, but --draft.vocab is {draft_vocab}: make it {len(ids)}.")
    if int(ids[-1]) >= target_vocab:
        raise UserError(
            f"{where} contains token {ids[-1]}, but the target has {target_vocab} tokens: it belongs to another target."
        )
    if len(end_token_ids) and not np.isin(list(end_token_ids), ids).any():
        raise UserError(
            f"{where} contains none of the end tokens {', '.join(map(str, end_token_ids))}: a draft could never end an "
            "answer. It belongs to another target, or was made without them."
        )
    return ids


def _find_map(path: Path, where: str) -> Int32[np.ndarray, " D"]:
    if path.is_file():
        return _read_map(path, where)
    if (path / "tables").is_dir():
        path = path / "tables"
    if maps := sorted(path.glob("d2t*.npy")):
        if len(maps) > 1:
            raise UserError(f"{path} contains {len(maps)} maps: give one of them, such as {maps[0]}.")
        return _read_map(maps[0], where)
    if (weights := path / "model.safetensors").is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(weights, "numpy") as file:
                tensors = {name: file.get_tensor(name) for name in ("d2t", "t2d") if name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights} cannot be read ({error}): copy it again.") from error
        if "d2t" in tensors:
            return _check_map(tensors["d2t"], tensors.get("t2d"), where)
    raise UserError(f"{where} does not exist: give a folder with d2t.npy and t2d.npy, a run, or a draft's folder.")


def _read_map(offsets: Path, where: str) -> Int32[np.ndarray, " D"]:
    mask = offsets.with_name(offsets.name.replace("d2t", "t2d"))
    try:
        return _check_map(np.load(offsets), np.load(mask) if mask.is_file() else None, where)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{where} cannot be read ({error}): create it again, or copy it again.") from error


def _check_map(
    offsets: Shaped[np.ndarray, "..."], in_draft: Shaped[np.ndarray, "..."] | None, where: str
) -> Int32[np.ndarray, " D"]:
    """Converts offsets [D] to ids. UserError unless the ids rise and are those that the mask [V] marks."""
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise UserError(f"{where}: d2t is {offsets.dtype} {list(offsets.shape)}; it must be a list of integers.")
    ids = np.arange(len(offsets)) + offsets.astype(np.int64)
    marked = None if in_draft is None else np.flatnonzero(in_draft)
    if marked is None and not offsets.any():
        raise UserError(
            f"{where}: d2t is all zeros and there is no t2d: this stands for the first tokens, used or not."
        )
    if np.any(np.diff(ids) <= 0) or ids[0] < 0 or (marked is not None and not np.array_equal(ids, marked)):
        raise UserError(
            f"{where}: d2t.npy and t2d.npy contradict each other, or d2t does not rise: d2t holds offsets (id = i + "
            "d2t[i]), and t2d marks those ids. Correct them; the tables/ of a run are made again after you delete them."
        )
    return ids.astype(np.int32)
