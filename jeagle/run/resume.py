"""What may change when a run goes on, and how it is compared with new settings before anything of it is touched.

A run is one experiment: what the draft learns, from what and by which loss, stays. How long and how fast it learns may
change, which is told. Where it is computed, and what is watched and kept, is free.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.config import RunConfig, from_json, to_json
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec
from jeagle.runtime.manifest import canonical, flat

CONFIG_FILE, DRAFT_FILE = "config.json", "draft.json"
"""In a run's folder: its settings, and what its draft is and was made from."""

FREE = "free"  # the draft is the same, up to rounding
TOLD = "told"  # the rest of the training differs
DATA = "new data"  # other rows: a trained run is refused
RUN = "new run"  # another experiment: a trained run is refused

ON_RESUME = {
    **dict.fromkeys(("name", "runs", "trackers", "profile", "mesh", "bench"), FREE),
    **dict.fromkeys(("features", "features_rest"), TOLD),
    "target": RUN,
    "data": DATA,
    "data.streaming": FREE,
    "data.vocabulary": RUN,
    "draft": RUN,
    "draft.engines": FREE,
    "objective": RUN,
    **dict.fromkeys(("train.steps", "train.epochs", "train.learning_rate", "train.warmup", "train.schedule"), TOLD),
    **dict.fromkeys(("train.decay", "train.weight_decay", "train.beta2", "train.clip", "train.ema"), TOLD),
    "train.held_out_rows": TOLD,
    **dict.fromkeys(("train.accumulate", "train.remat", "train.slot_buckets"), FREE),
    **dict.fromkeys(("train.save_every", "train.keep", "train.log_every"), FREE),
    **dict.fromkeys(("train.batch_rows", "train.optimizer", "train.dtype", "train.seed"), RUN),
    "regenerate": DATA,
    "regenerate.check": FREE,
    "store": RUN,
    **dict.fromkeys(("store.segment_mb", "store.check_rows"), FREE),
}
"""What a change of each setting, or of each setting of a group, means for a run that has a checkpoint. The tables of
docs/resuming.md say why."""

BY_CONTENT = (
    *("target.ref", "data.source", "data.vocabulary", "draft.json"),
    *("data.template", "data.user_header", "data.assistant_header", "data.end_of_turn"),
)
"""Settings that name something, which is compared in their place: another path to the same files is no change."""

_ZERO_IS_ANOTHER_STATE = ("train.clip", "train.ema")  # the optimiser's state has other parts with 0 than without
_NAMES = {
    "target": "the content of target.ref",
    "data.source": "the content of data.source",
    "data.tokenizer": "the tokenizer",
    "data.template": "the chat template",
    "data.version": "the version of jeagle that made the rows",
    "tables.given": "the content of data.vocabulary",
}
_SHOWN = 60  # characters of a value in a message


class Change(NamedTuple):
    """A setting that differs from that of an existing run: JSON of both values, and what it means there."""

    field: str
    old: str
    new: str
    kind: str

    def __str__(self) -> str:
        return _was(self.field, self.old, self.new)


def kind_of(field: str) -> str:
    """What a change of a setting means for a run that has a checkpoint."""
    return ON_RESUME.get(field) or ON_RESUME[field.split(".")[0]]


def changes(begun: RunConfig, config: RunConfig) -> list[Change]:
    """The settings in which a run that was begun differs from `config`, by name."""
    old, new = flat(to_json(begun)), flat(to_json(config))
    unused = [] if config.regenerate.live else ["regenerate"]
    unused += [] if begun.features == config.features == "auto" else ["store"]

    def kind(field: str) -> str:
        if field in BY_CONTENT or field.split(".")[0] in unused:
            return FREE
        if field == "draft.start" and _same_path(begun.draft.start, config.draft.start):
            return FREE
        if field in _ZERO_IS_ANOTHER_STATE and 0 in (json.loads(old[field]), json.loads(new[field])):
            return RUN
        return kind_of(field)

    differ = [field for field in sorted(new) if not _equal(old[field], new[field])]
    return [Change(field, old[field], new[field], kind(field)) for field in differ]


def decisive(config: RunConfig, *kinds: str) -> dict[str, str]:
    """JSON of the settings of these kinds, by name; not of those that only say where the target lies, or of a store."""
    fields = flat(to_json(config))
    others = ("target.ref", *(field for field in fields if field.startswith("store.")))
    return {field: value for field, value in fields.items() if kind_of(field) in kinds and field not in others}


def last_step(folder: Path) -> int | None:
    """The newest step that a run has a checkpoint of; None before its first."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def check_settings(config: RunConfig) -> list[Change]:
    """How the settings differ from those of the run that goes on; nothing for a run without a checkpoint.

    UserError for a change that needs new data or a new run, or fewer steps than the run has made.
    """
    if (begun := _begun(config.folder, CONFIG_FILE, from_json)) is None:
        return []
    found = changes(begun, config)
    if refused := [change for change in found if change.kind in (DATA, RUN)]:
        raise refusal(config.folder, f"settings ({'; '.join(map(str, refused))})")
    if config.train.steps:
        check_steps(config, config.train.steps, found)
    return [change for change in found if change.field not in ("name", "runs")]


def check_steps(config: RunConfig, steps: int, found: Sequence[Change] = ()) -> None:
    """UserError where a run of so many steps has made more, or has made them all and `found` would change the rest."""
    made = last_step(config.folder) or 0
    late = [c for c in found if c.kind == TOLD and c.field != "train.held_out_rows"] if made == steps else []
    if made > steps or late:
        wanted = f"are for the rest of the training ({'; '.join(map(str, late))})" if late else f"ask for {steps}"
        raise UserError(
            f"The run {config.folder} has made {made} steps, and these settings {wanted}: give more --train.steps, or "
            f"--fresh, which moves this run to {free_name(config.folder)} and starts anew."
        )


def check_inputs(config: RunConfig, made_from: dict[str, Any], spec: DraftSpec | None = None) -> None:
    """UserError where the run in the folder has a checkpoint, and was begun from something else.

    Args:
      made_from: as much of what draft.json holds under this name as is known; only what both know is compared.
      spec: of the draft, where it is known; its end tokens are not compared.
    """
    if (begun := _begun(config.folder, DRAFT_FILE, _made_from)) is None:
        return
    old, new = ({name: each[name] for name in made_from if name in begun} for each in (begun, made_from))
    if spec is not None:
        drafts = _begun(config.folder, DRAFT_FILE, _spec), spec
        old["draft"], new["draft"] = (dataclasses.replace(each, end_token_ids=()).to_json() for each in drafts)
    if told := told_differences(old, new):
        raise refusal(config.folder, f"inputs ({told})")


def told_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Each difference of two `made_from`, with the old and the new value; empty where they are the same."""
    before, after = flat(json.loads(canonical(old))), flat(json.loads(canonical(new)))
    names = sorted(n for n in before.keys() | after.keys() if not _equal(before.get(n, ""), after.get(n, "")))
    return "; ".join(_was(_NAMES.get(n, n), before.get(n, "missing"), after.get(n, "missing")) for n in names)


def refusal(folder: Path, what: str) -> UserError:
    """The error of a run that cannot go on; `what` names what was other when it was begun."""
    return UserError(
        f"The run {folder} was begun with other {what}. Give the same ones to go on with it, another --name to begin "
        f"another run, or train or pipeline with --fresh, which moves this run to {free_name(folder)} and starts anew."
    )


def free_name(folder: Path) -> Path:
    """NAME.N beside the folder, with the first number from 1 that is free."""
    places = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(place for place in places if not os.path.lexists(place))


def is_damaged(folder: Path) -> bool:
    """Whether a file that says what a run was begun with cannot be read."""
    try:
        for name, read in ((CONFIG_FILE, from_json), (DRAFT_FILE, _made_from), (DRAFT_FILE, _spec)):
            _begun(folder, name, read)
    except _Damaged:
        return True
    return False


class _Damaged(UserError):
    """A file of a run cannot be read."""


def check_there(path: Path) -> None:
    """UserError where a run with a checkpoint lacks one of the files that say what it was trained with."""
    if not path.is_file():
        raise _Damaged(
            f"The run {path.parent} has checkpoints and no {path.name}, so that nothing says what they were trained "
            "with: restore it from a copy, or begin another run with another --name, or with --fresh."
        )


def _made_from(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree["made_from"]}


def _spec(tree: dict[str, Any]) -> DraftSpec:
    return DraftSpec.from_json(tree["draft"])


def _begun(folder: Path, name: str, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What a file says of a run that has a checkpoint; None for a run that has none."""
    path = folder / name
    if last_step(folder) is None:
        return None
    check_there(path)
    try:
        return read(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or begin another run with another "
            "--name, or with --fresh."
        ) from error


def _was(name: str, old: str, new: str) -> str:
    old, new = (text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..." for text in (old, new))
    return f"{name} was {old} and is {new}"


def _equal(old: str, new: str) -> bool:
    """Whether two JSON texts say the same; 1 is 1.0, which flags and recipes write differently."""
    try:
        return old == new or float(old) == float(new)
    except ValueError:
        return False


def _same_path(one: str, other: str) -> bool:
    places = {os.path.realpath(Path(path).expanduser()) for path in (one, other)}
    return bool(one and other) and len(places) == 1
