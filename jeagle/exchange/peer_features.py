"""Hidden states that SpecForge, speculators and vLLM wrote, a file a sample, read into one form.

Which layers the taps are is written in none of these files: speculators' data_config.json has it for its first format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from jeagle.errors import UserError
from jeagle.exchange.torch_pickle import read_torch


class Sample(NamedTuple):
    """A conversation's tokens with their features.

    Attributes:
      tokens: int32 [T]. supervised: bool [T].
      taps: [T, A, H], shallow to deep. last: [T, H], after the final norm or before it, as the format has it.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    aux: np.ndarray
    last: np.ndarray


class PeerFeatures(NamedTuple):
    """A folder of samples.

    Attributes:
      format: what wrote it. files: one a sample. read: from an index to its sample.
      normed: `last` has seen the final norm.
      boundaries: layers after which the taps were taken, where the folder says so.
    """

    format: str
    files: list[Path]
    read: Callable[[int], Sample]
    normed: bool
    boundaries: tuple[int, ...] = ()


def open_peer_features(folder: Path) -> PeerFeatures:
    """The samples in a folder, in the peers' order.

    Raises:
      UserError: where there are none of a known form.
    """
    if ckpts := sorted([*folder.rglob("*.ckpt"), *folder.rglob("*.ckpt.gz")]):
        return PeerFeatures("SpecForge", ckpts, lambda i: _specforge(ckpts[i]), True)
    if (states := folder / "hidden_states").is_dir() or any(folder.glob("hs_*.safetensors")):
        return _current(folder, states if states.is_dir() else folder)
    if files := sorted(folder.glob("*.pt"), key=_number):
        files = [f for f in files if _number(f) >= 0]
        return _pickled(folder, files)
    raise UserError(
        f"{folder} holds no hidden states of a known form: *.ckpt of SpecForge, data_*.pt of speculators up to 0.4, or "
        "hidden_states/hs_*.safetensors of later speculators and of vLLM."
    )


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _specforge(path: Path) -> Sample:
    tree = read_torch(path)
    last, aux = np.squeeze(tree["hidden_state"], 0), np.squeeze(tree["aux_hidden_state"], 0)
    return _checked(path, tree["input_ids"], tree["loss_mask"], aux.reshape(len(aux), -1, last.shape[-1]), last)


def _pickled(folder: Path, files: list[Path]) -> PeerFeatures:
    """speculators' first formats: a list of states, or (format 0) the concatenated taps and the last one."""
    if not files:
        raise UserError(f"{folder} holds no data_*.pt.")
    first = read_torch(files[0])
    if "hidden_states" not in first:
        return PeerFeatures("speculators, data format 0", files, lambda i: _format_0(files[i]), False)
    described = folder / "data_config.json"
    ids = json.loads(described.read_text())["hidden_states"]["layer_ids"] if described.is_file() else []
    # An id there is the layer that is left, counted from 0.
    boundaries = tuple(int(i) + 1 for i in ids[:-1])
    return PeerFeatures("speculators, data format 1", files, lambda i: _format_1(files[i]), False, boundaries)


def _format_0(path: Path) -> Sample:
    tree = read_torch(path)
    last, aux = tree["target"], tree["hidden_state"]
    return _checked(path, tree["input_ids"], tree["loss_mask"], aux.reshape(len(aux), -1, last.shape[-1]), last)


def _format_1(path: Path) -> Sample:
    tree = read_torch(path)
    *aux, last = tree["hidden_states"]
    return _checked(path, tree["input_ids"], tree["loss_mask"], np.stack(aux, axis=1), last)


def _current(folder: Path, states: Path) -> PeerFeatures:
    """safetensors beside a dataset that has the masks; without one every token counts as an answer's."""
    files = sorted(states.glob("hs_*.safetensors"), key=_number)
    rows: Any = None
    if arrows := sorted(folder.glob("data-*.arrow")):
        import datasets

        # The folder's own format is "torch", which load_from_disk would insist on.
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in arrows])

    def read(i: int) -> Sample:
        tree = load_file(files[i])
        found = tree["hidden_states"]
        if "hidden_states_scales" in tree:
            found = (found.astype(np.float32) * tree["hidden_states_scales"]).astype(ml_dtypes.bfloat16)
        tokens, mask = tree["token_ids"], np.ones(len(tree["token_ids"]), bool)
        if rows is not None:
            row = rows[_number(files[i])]
            mask = np.asarray(row["loss_mask"])
            if list(row["input_ids"]) != tokens.tolist():
                raise UserError(f"{files[i]} holds other tokens than row {_number(files[i])} of {folder}.")
        return _checked(files[i], tokens, mask, found[:, :-1], found[:, -1])

    name = "speculators" if rows is not None else "vLLM"
    return PeerFeatures(f"{name}, safetensors", files, read, False)


def _checked(path: Path, tokens: np.ndarray, mask: np.ndarray, aux: np.ndarray, last: np.ndarray) -> Sample:
    """UserError for a file that its own readers would have taken silently: short, or not finite."""
    lengths = {len(tokens), len(mask), len(aux), len(last)}
    if len(lengths) > 1:
        raise UserError(
            f"{path} holds {len(tokens)} tokens, {len(mask)} mask bits and {len(aux)} states: it is cut short."
        )
    for states in (aux, last):
        if not np.isfinite(states.astype(np.float32)).all():
            raise UserError(f"{path} holds states that are not numbers.")
    return Sample(np.asarray(tokens, np.int32), np.asarray(mask).astype(bool), aux, last)
