"""Orbax checkpoints of named arrays, saved asynchronously, restored exactly, and verified by checksums of their values.

Orbax 0.12 stores its arrays without checksums. The checksums are part of its `_METADATA`; checkpoints of jeagle before
version 0.2 have none, and are restored unverified.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from jeagle.errors import UserError
from jeagle.runtime import distributed
from jeagle.runtime.checksums import described
from jeagle.runtime.disk import check_room, full_disk
from jeagle.runtime.manifest import set_aside

_CHUNK_BYTES = 1 << 26  # so that a part of a large array can be read alone
CHECKSUMS = "checksums"
"""Where the `_METADATA` of a checkpoint has the checksums, in its `custom_metadata`."""
_MARGIN, _LEAST = 1.02, 1 << 16  # of a checkpoint's bytes: what Orbax writes besides the arrays
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or that holds other values than were saved."""


class Checkpoints:
    """The checkpoints of one run, a folder each, named by step. One process of a machine writes them at a time.

    A tree of arrays is stored by dotted names, so that what is read back does not depend on the classes that held it.
    As a context manager it completes the save under way, however the block ends; in a run of several processes one
    that fails leaves it to be discarded whole by the next start, since the others may never complete it.

    Args:
      keep: how many of the newest are kept.
      scores: by step, higher is better; the best of those that are there is kept besides. It may grow while the run
        goes on, and must do so alike in all processes.
    """

    def __init__(self, folder: Path, *, keep: int, scores: Mapping[int, float] | None = None):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails is raised, and said once
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, {} if scores is None else scores), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the block's own error is the one to report
                self.close()

    def latest(self) -> int | None:
        """The newest step that was saved whole; one that was cut off does not count."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any) -> None:
        """Copies the arrays off the device and returns; they are written in the background.

        Raises:
          UserError: where the disk has no room for them, or had none for those before them.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        named = _named(tree)
        needed = int(sum(array.nbytes for array in named.values()) * _MARGIN) + _LEAST
        check_room(self.folder, needed, f"The checkpoint of step {step}", self._advice())
        pieces = dict.fromkeys(named, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
        sums = {CHECKSUMS: described(named)}
        with self._discarding():
            self._manager.save(step, args=ocp.args.StandardSave(named, save_args=pieces, custom_metadata=sums))

    def restore(self, step: int, like: Any) -> Any:
        """The tree saved at `step`, laid out as `like` is.

        Raises:
          DamagedCheckpoint: when its values are not those that were saved.
          UserError: when there is no such step, or its arrays are not those of `like`.
        """
        chosen_step(self.steps(), step, where=str(self.folder))
        wanted, where = _named(like), self.folder / str(step)
        with _named_damage(where):
            metadata = _intact_metadata(self._manager, step, where)
            if others := sorted(_shapes(metadata.tree).items() ^ _shapes(wanted).items()):
                raise UserError(
                    f"The checkpoint {where} does not fit this configuration ({' '.join(others[0])}): use the settings "
                    "that it was made with, or another run name."
                )
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        _verify(where, _checksums(metadata), restored)
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])

    def newest(self, like: Any) -> tuple[int, Any]:
        """(step, tree) of the newest checkpoint that is whole; (0, `like`) where none was saved.

        Newer ones that are damaged are moved to damaged/ beside the folder, and a line on stdout names them.

        Raises:
          UserError: when all of them are damaged, or the arrays are not those of `like`. Nothing has been moved then.
        """
        reasons: dict[int, str] = {}
        for step in reversed(self.steps()):
            tree, reason = None, ""
            try:
                tree = self.restore(step, like)
            except DamagedCheckpoint as error:
                reason = str(error)
            if not distributed.anywhere(bool(reason)):
                for damaged in reasons:
                    if distributed.is_leader():
                        aside = set_aside(self.folder / str(damaged), self.folder.parent, f"checkpoint_{damaged}")
                        print(f"warning: {reasons[damaged]} It was moved to {aside}; step {step} is used.", flush=True)
                distributed.anywhere(False)  # nobody looks for steps before they have been moved
                self._manager.reload()
                return step, tree
            reasons[step] = reason or f"The checkpoint {self.folder / str(step)} is damaged on another process."
        if reasons:
            raise UserError(
                f"{next(iter(reasons.values()))} None of the {len(reasons)} checkpoints of {self.folder} can be used: "
                "restore them from a copy, or move the folder away to train anew."
            )
        return 0, like

    def wait(self) -> None:
        """Until everything is on disk. UserError where the disk is full."""
        with self._discarding():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of what Orbax holds."""
        self.wait()
        self._manager.close()

    def _advice(self) -> str:
        last = self.latest()
        return f"make room, or lower --train.keep, and start the same command again; it continues from step {last or 0}"

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        """Removes what a save that fails has written; UserError where it failed because the disk is full."""
        try:
            yield
        except Exception as error:
            if distributed.is_leader():
                for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            if full := full_disk(error, self.folder, "A checkpoint", self._advice()):
                raise full from error
            raise


def _checksums(metadata: Any) -> dict[str, str]:
    """The text of each array, as `described` made it; empty for a checkpoint that has none."""
    return (getattr(metadata, "custom_metadata", None) or {}).get(CHECKSUMS) or {}


def _verify(where: Path, saved: Mapping[str, str], restored: Mapping[str, Any], *, partly: bool = False) -> None:
    """DamagedCheckpoint unless these are the arrays that were saved, or with `partly` some of them."""
    found = described(restored) if saved else {}
    names = found if partly else {*found, *saved}
    if wrong := sorted(name for name in names if found.get(name) != saved.get(name)):
        raise damaged_checkpoint(where, f"{len(wrong)} arrays are not those that were saved, the first is {wrong[0]}")


def damaged_checkpoint(where: Any, why: object) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"The checkpoint {where} is incomplete or damaged ({first_line(why)}): use another step.")


def first_line(error: object) -> str:
    """What an error says, short enough for a message."""
    kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return f"{kind}{error}".strip().splitlines()[0][:200]


@contextlib.contextmanager
def _named_damage(where: Path) -> Iterator[None]:
    """Turns whatever Orbax raises for a damaged checkpoint into a sentence."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Orbax and what lies below it raise many kinds
        if any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        raise damaged_checkpoint(where, error) from error


def _intact_metadata(manager: ocp.CheckpointManager, step: int, where: Path) -> Any:
    """Orbax's description of a checkpoint, whose arrays have the names and shapes that were saved."""
    metadata = manager.item_metadata(step)
    saved = {name: text.partition("]")[0] + "]" for name, text in _checksums(metadata).items()}
    if saved and saved != _shapes(metadata.tree):  # what is not read is not verified, and shapes take memory
        raise damaged_checkpoint(where, "its arrays have other names or shapes than those that were saved")
    return metadata


def _shapes(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(list(array.shape)) for name, array in arrays.items()}


@dataclasses.dataclass
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """The newest checkpoints, and the one with the best score."""

    newest: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self.newest :], best_step(steps, self.scores)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def best_step(steps: Iterable[int], scores: Mapping[int, float]) -> int | None:
    """Of these steps the one with the highest score, the later one of two; None where none has one."""
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    return max(scored, key=lambda step: (scores[step], step), default=None)


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def load_named(
    folder: Path,
    step: int | str,
    scores: Mapping[int, float] | None = None,
    names: Callable[[Iterable[str]], Iterable[str]] = list,
) -> tuple[int, dict[str, Any]]:
    """(step, arrays by name) of a checkpoint on this process's host memory; `step` as of `chosen_step`.

    Args:
      names: of the names of all arrays those that are read.

    Raises:
      UserError: when there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: the run has saved no checkpoint yet.")
    with ocp.CheckpointManager(folder.absolute(), item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        chosen = chosen_step(manager.all_steps(), step, where=str(folder), scores=scores)
        where = folder / str(chosen)
        with _named_damage(where):
            metadata = _intact_metadata(manager, chosen, where)
            wanted = {name: metadata.tree[name] for name in names(metadata.tree)}
            on_host = dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=on_host, partial_restore=True)
            arrays = manager.restore(chosen, args=args)
        _verify(where, _checksums(metadata), arrays, partly=True)
        return chosen, arrays


def chosen_step(steps: Iterable[int], step: int | str, *, where: str, scores: Mapping[int, float] | None = None) -> int:
    """The step asked for, of those whose checkpoints are finished: a number, "last" for the newest, or "best".

    Args:
      scores: what "best" goes by, by step; of other steps than those that are there, too.

    Raises:
      UserError: without such a checkpoint, or for "best" where none of them has a score.
    """
    there, scores = sorted(steps), scores or {}
    if not there:
        raise UserError(f"{where} holds no finished checkpoint: let the run save one first.")
    listed = ", ".join(map(str, there))
    chosen = {"last": there[-1], "best": best_step(there, scores)} | {str(number): number for number in there}
    if str(step) not in chosen:
        raise UserError(f"{where} has no checkpoint of step {step}; it has {listed}.")
    if (number := chosen[str(step)]) is None:
        raise UserError(
            f"{where} has no checkpoint with held-out figures, which the best step is chosen by: give --step last, "
            f"or one of {listed}."
        )
    return number
