"""The command line of the commands that take a run's settings: a recipe, and flags that override its fields.

A recipe is a Python file with `get_config() -> RunConfig`. Every field can be overridden by its dotted path:
`--train.steps 2000 --target.ref DIR --data.source FILE --draft.ttt-steps 7`. Without a recipe the fields have their
defaults.
"""

import dataclasses
import difflib
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from jeagle.config import DraftConfig, RunConfig, TrainConfig
from jeagle.errors import UserError
from jeagle.places import expanded, with_homes

SHORT = {"target": "target.ref"}
"""Spellings that other commands have, and the field that they mean here."""
FRESH = "--fresh"
"""Of commands that train: move the existing run aside, and start anew."""
_FRESH_ELSEWHERE = ("--no-resume-from-checkpoint", "--no_resume_from_checkpoint")


def from_command_line(
    arguments: Sequence[str], *, program: str, description: str, reads: Sequence[str] = ()
) -> RunConfig:
    """The config of a command's arguments: of --config FILE where it is given, with the other flags applied.

    Args:
      reads: fields and groups of fields that the command reads, which --help shows; empty for all. Every field is
        accepted, so that the same flags fit every command.

    Raises:
      UserError: for a recipe or a flag that does not exist, or a value that no run can have.
    """
    recipe, rest = take_flag(arguments, "--config", "the path of a recipe, such as configs/llama3_8b.py")
    config = load_recipe(recipe) if recipe is not None else RunConfig(name="")
    config = parse_overrides(config, rest, program=f"{program} [--config FILE]", description=description, reads=reads)
    if not config.name:
        raise UserError(
            f"{program} needs --name NAME, the name of the run, or --config FILE with a recipe that has one."
        )
    check_name(config.name)
    return with_homes(config)


def check_name(name: str) -> None:
    """UserError unless a run's name is the name of a folder in --runs, which no program takes for an option."""
    wrong = {
        "leaves the folder of all runs": name in (".", ".."),
        "has a / in it": "/" in name,
        "begins with a dash, as options do": name.startswith("-"),
        "has a line break or another control character in it": not name.isprintable(),
        "begins or ends with a space": name != name.strip(),
    }
    if faults := [fault for fault, holds in wrong.items() if holds]:
        raise UserError(
            f"--name {name!r} {' and '.join(faults)}: give the name of one folder, which is made in --runs."
        )


def take_flag(arguments: Sequence[str], flag: str, value: str) -> tuple[str | None, list[str]]:
    """The value of a flag that is a place and no field of RunConfig, None without it; and the other arguments.

    Args:
      value: what the flag needs, for the message where its value is missing.
    """
    rest = list(arguments)
    for i, argument in enumerate(rest):
        if argument == flag:
            if i + 1 == len(rest):
                raise UserError(f"{flag} needs {value}.")
            return expanded(rest[i + 1]), rest[:i] + rest[i + 2 :]
        if argument.startswith(f"{flag}="):
            return expanded(argument.partition("=")[2]), rest[:i] + rest[i + 1 :]
    return None, rest


def take_fresh(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether --fresh is among the arguments, also in the spelling of other trainers; and the other arguments."""
    rest = [argument for argument in arguments if argument not in (FRESH, *_FRESH_ELSEWHERE)]
    return len(rest) < len(arguments), rest


def load_recipe(path: str | Path) -> RunConfig:
    """The RunConfig of a recipe file. UserError if the file or its get_config() is missing or of another kind."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"No recipe at {path}{hint or ': give a Python file that defines get_config().'}")
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        raise UserError(f"The recipe {path} does not run: {type(error).__name__}: {error}.") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"get_config() of {path} returns {type(config).__name__}; it must return a jeagle RunConfig.")
    return config


def parse_overrides(
    config: RunConfig, arguments: Sequence[str], *, program: str, description: str, reads: Sequence[str] = ()
) -> RunConfig:
    """`config` with dotted flags applied. Prints help and exits 0 on --help; UserError on an unknown or bad flag."""
    arguments = [_normal_flag(argument) for argument in arguments]
    for argument in arguments:
        if argument.startswith("--") and argument != "--help":
            check_field(argument[2:].split("=")[0])
    kind = _showing(reads) if reads and {"--help", "-h"} & set(arguments) else RunConfig
    changed = tyro.cli(
        kind,
        default=_converted(config, kind),
        args=arguments,
        prog=program,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )
    validate(changed)
    return changed


def _showing(reads: Sequence[str], kind: type = RunConfig, prefix: str = "") -> type:
    """A subclass of `kind` whose help shows the fields in `reads`, a dotted path or a group of fields each."""
    annotations: dict[str, Any] = {}
    types = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        path = prefix + field.name
        shown = any(path == read or path.startswith(f"{read}.") for read in reads)
        if dataclasses.is_dataclass(field.default) and any(read.startswith(f"{path}.") for read in reads):
            annotations[field.name] = _showing(reads, type(field.default), f"{path}.")
        else:
            annotations[field.name] = types[field.name] if shown else Annotated[types[field.name], tyro.conf.Suppress]
    body = {"__annotations__": annotations, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(kind.__name__, (kind,), body))


def _converted(config: Any, kind: type) -> Any:
    """The same values in `kind`, a class that `_showing` made of the config's."""
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    return kind(
        **{
            name: _converted(value, types[name]) if dataclasses.is_dataclass(types[name]) else value
            for name, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
        }
    )


def _normal_flag(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    flag = flag.replace("_", "-")
    return f"--{SHORT.get(flag, flag)}{equals}{value}"


def field_paths(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Dotted paths of every leaf field, as flags spell them: train.batch-rows."""
    paths = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.default):
            paths += field_paths(type(field.default), f"{name}.")
        else:
            paths.append(name)
    return paths


def check_field(flag: str) -> None:
    """UserError, with the nearest name suggested, unless `flag` is the dotted path of a field."""
    paths = field_paths()
    if flag in paths:
        return
    if renamed := RENAMED_FLAGS.get(flag):
        raise UserError(f"--{flag} is called --{renamed} now.")
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in paths}
    near = difflib.get_close_matches(flag, paths, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(flag.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.75)
    guess = near[0] if near else (by_leaf[leaf[0]] if leaf else None)
    hint = f"did you mean --{guess}?" if guess else "--help lists the settings."
    raise UserError(f"No setting is called --{flag}: {hint}")


RENAMED_FLAGS = {"target.taps": "target.aux-layers", "store.taps": "store.aux-dtype", "store.last": "store.last-dtype"}


def validate(config: RunConfig) -> None:
    """UserError for values that no run can have."""
    positive = {
        "data.row-length": config.data.row_length,
        "draft.layers": config.draft.layers,
        "draft.ttt-steps": config.draft.ttt_steps,
        "train.batch-rows": config.train.batch_rows,
        "train.accumulate": config.train.accumulate,
        "train.learning-rate": config.train.learning_rate,
        "train.log-every": config.train.log_every,
        "train.save-every": config.train.save_every,
        "train.keep": config.train.keep,
        "train.slot-buckets": config.train.slot_buckets,
        "bench.draft-tokens": config.bench.draft_tokens,
        "bench.max-new-tokens": config.bench.max_new_tokens,
        "bench.batch": config.bench.batch,
        "store.segment-mb": config.store.segment_mb,
        "store.top-k": config.store.top_k,
    }
    for flag, value in positive.items():
        if value <= 0:
            raise UserError(f"--{flag} is {value}; it must be above 0.")
    if config.features_rest == "online" and config.features in ("online", "auto"):
        raise UserError(
            f"--features-rest online is about a store that lacks rows, and --features {config.features} names none: "
            "give --features STORE, or leave it out."
        )
    if config.data.max_conversations < 0:
        raise UserError(f"--data.max-conversations is {config.data.max_conversations}; 0 takes all, none is negative.")
    if not 0 <= config.data.held_out < 1:
        raise UserError(f"--data.held-out is {config.data.held_out}; it is a share, from 0 up to but not including 1.")
    if not 0 <= config.data.bad_share <= 1:
        raise UserError(f"--data.bad-share is {config.data.bad_share}; it is a share, from 0 to 1.")
    _validate_training(config.train)
    drawn = config.regenerate
    if drawn.temperature < 0 or drawn.top_k < 0 or not 0 < drawn.top_p <= 1:
        raise UserError(
            f"--regenerate.temperature {drawn.temperature} --regenerate.top-p {drawn.top_p} --regenerate.top-k "
            f"{drawn.top_k}: the temperature and top-k are 0 or above, top-p above 0 and up to 1."
        )
    _validate_draft(config.draft)


def _validate_draft(draft: DraftConfig) -> None:
    if draft.fc_norm and draft.norm_before_fc:
        raise UserError("draft.fc_norm and draft.norm_before_fc exclude each other: switch one off.")
    if draft.json and draft.start:
        raise UserError("--draft.json and --draft.start both say what the draft is: leave one out.")
    if draft.lora and not draft.start:
        raise UserError(f"--draft.lora {draft.lora} trains beside a draft that stays: name it with --draft.start.")
    for name in ("vocab", "width", "heads", "kv_heads", "head_dim", "mlp_width", "sliding_window", "lora"):
        if getattr(draft, name) < 0:
            raise UserError(f"--draft.{name.replace('_', '-')} is {getattr(draft, name)}; it must be 0 or above.")


def _validate_training(train: TrainConfig) -> None:
    if train.batch_rows % train.accumulate:
        raise UserError(
            f"--train.batch-rows {train.batch_rows} does not divide by --train.accumulate {train.accumulate}."
        )
    if train.held_out_rows < 0:
        raise UserError(f"--train.held-out-rows is {train.held_out_rows}; it must be 0 or above.")
    for flag, share in {"train.ema": train.ema, "train.warmup": train.warmup, "train.decay": train.decay}.items():
        if not 0 <= share < 1:
            raise UserError(f"--{flag} is {share}; it is a share, from 0 up to but not including 1.")
    if train.ema and train.optimizer == "schedule_free":
        raise UserError("--train.ema and --train.optimizer schedule_free both average the parameters: leave one out.")
