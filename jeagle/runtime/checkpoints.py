"""Orbax checkpoints of named arrays, saved asynchronously and restored exactly."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jeagle.errors import UserError

_CHUNK_BYTES = 1 << 26  # so that a part of a large array can be read alone


class Checkpoints:
    """The checkpoints of one run, a folder each, named by step.

    A tree of arrays is stored by dotted names, so that what is read back does not depend on the classes that held it.

    Args:
      keep: how many of the newest are kept.
      scores: by step, higher is better; the best of those that are there is kept besides. It may grow while the run
        goes on, and must do so alike in all processes.
    """

    def __init__(self, folder: Path, *, keep: int, scores: Mapping[int, float] | None = None):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(preservation_policy=_Kept(keep, {} if scores is None else scores))
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.folder = folder

    def latest(self) -> int | None:
        """The newest step that was saved whole; one that was cut off does not count."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any) -> None:
        """Copies the arrays off the device and returns; they are written in the background."""
        if step not in self._manager.all_steps():
            named = _named(tree)
            pieces = dict.fromkeys(named, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
            self._manager.save(step, args=ocp.args.StandardSave(named, save_args=pieces))

    def restore(self, step: int, like: Any) -> Any:
        """The tree saved at `step`, laid out as `like` is.

        Raises:
          UserError: when there is no such step, or its arrays are not those of `like`.
        """
        chosen_step(self.steps(), step, where=str(self.folder))
        wanted = _named(like)
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoint {self.folder / str(step)} does not fit this configuration "
                f"({str(error).splitlines()[0][:200]}): use the settings that it was made with, or another run name."
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of what Orbax holds."""
        self.wait()
        self._manager.close()


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


def load_named(folder: Path, step: int | str, scores: Mapping[int, float] | None = None) -> tuple[int, dict[str, Any]]:
    """(step, arrays by name) of a checkpoint on this process's host memory; `step` as of `chosen_step`.

    Raises:
      UserError: when there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: the run has saved no checkpoint yet.")
    with ocp.CheckpointManager(folder.absolute()) as manager:
        chosen = chosen_step(manager.all_steps(), step, where=str(folder), scores=scores)
        return chosen, manager.restore(chosen, args=ocp.args.StandardRestore())


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
