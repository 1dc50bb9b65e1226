"""Hidden states that SpecForge, speculators and vLLM wrote, one file for each sample, in one form.

These files do not say which layers their aux hidden states belong to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file

from jeagle.errors import UserError
from jeagle.exchange.torch_pickle import read_torch


class Sample(NamedTuple):
    """A conversation's tokens with their hidden states.

    Attributes:
      tokens: token ids, int32.
      supervised: the loss mask.
      aux: aux hidden states, from the lowest layer to the highest.
      last: hidden states after the last layer, before or after the final norm: `PeerFeatures.normed` says which.
    """

    tokens: Int[np.ndarray, " T"]
    supervised: Bool[np.ndarray, " T"]
    aux: Float[np.ndarray, "T A H"]
    last: Float[np.ndarray, "T H"]


class PeerFeatures(NamedTuple):
    """A folder of samples.

    Attributes:
      format: the trainer that wrote it, and its format.
      files: one for each sample, in the trainer's order.
      read: from the number of a sample to the sample. UserError for a file that is damaged.
      normed: whether the last hidden states have passed the final norm.
    """

    format: str
    files: list[Path]
    read: Callable[[int], Sample]
    normed: bool


def open_peer_features(folder: Path) -> PeerFeatures:
    """The samples in a folder.

    Raises:
      UserError: where there are none of a known format.
    """
    if ckpts := sorted([*folder.rglob("*.ckpt"), *folder.rglob("*.ckpt.gz")]):
        return PeerFeatures("SpecForge", ckpts, lambda i: _torch_sample(ckpts[i]), True)
    states = folder / "hidden_states" if (folder / "hidden_states").is_dir() else folder
    if files := sorted(states.glob("hs_*.safetensors"), key=_number):
        return _safetensors(folder, files)
    if pickles := [f for f in sorted(folder.glob("*.pt"), key=_number) if _number(f) >= 0]:
        version = int("hidden_states" in read_torch(pickles[0]))
        return PeerFeatures(f"speculators, data format {version}", pickles, lambda i: _torch_sample(pickles[i]), False)
    raise UserError(
        f"{folder} contains no hidden states of a known format: *.ckpt of SpecForge, data_*.pt of speculators up to "
        "0.4, or hidden_states/hs_*.safetensors of later speculators and of vLLM."
    )


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _torch_sample(path: Path) -> Sample:
    """Format 1 of speculators is a list of hidden states; format 0 and SpecForge concatenate the aux hidden states."""
    tree = read_torch(path)
    if "hidden_states" in tree:
        *states, last = tree["hidden_states"]
        aux = np.stack(states, axis=1)
    else:
        if "aux_hidden_state" in tree:
            last, aux = np.squeeze(tree["hidden_state"], 0), np.squeeze(tree["aux_hidden_state"], 0)
        else:
            last, aux = tree["target"], tree["hidden_state"]
        aux = aux.reshape(len(aux), -1, last.shape[-1])
    return _checked(path, tree["input_ids"], tree["loss_mask"], aux, last)


def _safetensors(folder: Path, files: list[Path]) -> PeerFeatures:
    """Files beside a dataset that contains the loss masks; without the dataset every token counts as supervised."""
    rows: Any = None
    if arrows := sorted(folder.glob("data-*.arrow")):
        import datasets

        # load_from_disk would insist on torch, because the folder's own format is "torch".
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in arrows])

    def read(i: int) -> Sample:
        tree = load_file(files[i])
        hidden = tree["hidden_states"]
        if "hidden_states_scales" in tree:
            hidden = (hidden.astype(np.float32) * tree["hidden_states_scales"]).astype(ml_dtypes.bfloat16)
        tokens, mask = tree["token_ids"], np.ones(len(tree["token_ids"]), bool)
        if rows is not None:
            row = rows[_number(files[i])]
            mask = np.asarray(row["loss_mask"])
            if list(row["input_ids"]) != tokens.tolist():
                raise UserError(f"{files[i]} contains other tokens than row {_number(files[i])} of {folder}.")
        return _checked(files[i], tokens, mask, hidden[:, :-1], hidden[:, -1])

    return PeerFeatures(f"{'vLLM' if rows is None else 'speculators'}, safetensors", files, read, False)


def _checked(path: Path, tokens: np.ndarray, mask: np.ndarray, aux: np.ndarray, last: np.ndarray) -> Sample:
    """UserError for a file that is cut short or not finite, which its own readers accept without a word."""
    if len({len(tokens), len(mask), len(aux), len(last)}) > 1:
        raise UserError(
            f"{path} contains {len(tokens)} tokens, {len(mask)} bits of the loss mask and {len(aux)} hidden states: it "
            "is cut short."
        )
    for states in (aux, last):
        if not np.isfinite(states.astype(np.float32)).all():
            raise UserError(f"{path} contains hidden states that are not finite numbers.")
    return Sample(np.asarray(tokens, np.int32), np.asarray(mask).astype(bool), aux, last)
