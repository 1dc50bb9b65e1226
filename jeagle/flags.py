"""The tree of settings of a run, loading a recipe, and overriding any field of it on the command line.

A recipe is a Python file with `get_config() -> RunConfig`. Every field can be overridden by its dotted path:
`--train.steps 2000 --target.ref DIR --data.source FILE --draft.ttt-steps 7`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from jeagle.config import (
    BenchConfig,
    DataConfig,
    DraftConfig,
    MeshConfig,
    ObjectiveConfig,
    RegenerateConfig,
    RunConfig,
    StoreConfig,
    TargetConfig,
    TrainConfig,
)
from jeagle.errors import UserError

__all__ = [
    "BenchConfig",
    "DataConfig",
    "DraftConfig",
    "MeshConfig",
    "ObjectiveConfig",
    "RegenerateConfig",
    "RunConfig",
    "StoreConfig",
    "TargetConfig",
    "TrainConfig",
    "check_field",
    "field_paths",
    "from_command_line",
    "from_json",
    "load_recipe",
    "parse_overrides",
    "to_json",
    "validate",
]


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


def parse_overrides(config: RunConfig, arguments: Sequence[str], *, program: str, description: str) -> RunConfig:
    """`config` with dotted flags applied. Prints help and exits 0 on --help; UserError on an unknown or bad flag."""
    arguments = [_normal_flag(a) for a in arguments]
    for argument in arguments:
        if argument.startswith("--") and argument not in ("--help",):
            check_field(argument[2:].split("=")[0])
    changed = tyro.cli(
        RunConfig,
        default=config,
        args=arguments,
        prog=program,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )
    validate(changed)
    return changed


def _normal_flag(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


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
    by_leaf = {p.rsplit(".", 1)[-1]: p for p in paths}
    near = difflib.get_close_matches(flag, paths, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(flag.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.75)
    guess = near[0] if near else (by_leaf[leaf[0]] if leaf else None)
    hint = f"did you mean --{guess}?" if guess else "--help lists every field."
    raise UserError(f"No setting is called --{flag}: {hint}")


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


def to_json(config: RunConfig) -> dict[str, Any]:
    """A JSON tree from which `from_json` makes the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(tree: dict[str, Any]) -> RunConfig:
    """The config that `to_json` wrote; fields that it lacks take their defaults."""

    def build(kind: type, values: dict[str, Any]) -> Any:
        known = {f.name: f for f in dataclasses.fields(kind)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(f"config.json has settings that this jeagle does not know: {', '.join(unknown)}.")
        parts = {}
        for name, value in values.items():
            default = known[name].default
            if dataclasses.is_dataclass(default):
                value = build(type(default), value)
            parts[name] = tuple(value) if isinstance(value, list) else value
        return kind(**parts)

    return build(RunConfig, tree)


def from_command_line(arguments: Sequence[str], *, program: str, description: str) -> RunConfig:
    """`--config FILE` and overrides, from a command's arguments. Without --config, UserError (or help)."""
    arguments = list(arguments)
    recipe = None
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 >= len(arguments):
                raise UserError("--config needs the path of a recipe, such as configs/llama3_8b.py.")
            recipe, rest = arguments[i + 1], arguments[:i] + arguments[i + 2 :]
            break
        if argument.startswith("--config="):
            recipe, rest = argument.split("=", 1)[1], arguments[:i] + arguments[i + 1 :]
            break
    if recipe is None:
        if "--help" in arguments or "-h" in arguments:
            recipe_free = RunConfig(name="NAME")
            return parse_overrides(recipe_free, ["--help"], program=f"{program} --config FILE", description=description)
        raise UserError(f"{program} needs --config FILE, such as --config configs/smollm2_135m.py.")
    return parse_overrides(load_recipe(recipe), rest, program=f"{program} --config {recipe}", description=description)


if __name__ == "__main__":
    sys.exit("jeagle.flags is a module, not a command: try python -m jeagle.train --help")
