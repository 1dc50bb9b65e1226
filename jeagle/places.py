"""Places: settings and flags that name a file or a folder of this machine, however they are spelled.

A setting that is one is annotated `Place`, so that ~ is understood in every one of them, a configuration that is
written down means the same from another working directory, and two spellings of one place do not count as a change.
"""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from jeagle.errors import UserError

_PLACE, _OR_NAME, _SEVERAL = "place", "or a name", "several"
Place = Annotated[str, _PLACE]
"""One path; where nothing lies there it may be something else, such as a hub id."""
PlaceOrName = Annotated[str, _PLACE, _OR_NAME]
"""A name that jeagle or the target knows, which comes first, or the path of a file."""
Places = Annotated[str, _PLACE, _SEVERAL]
"""Paths and other words with commas between them: who reads them calls `expanded` for each."""

Settings = TypeVar("Settings")


def expanded(path: str) -> str:
    """The path with the home folder in place of ~ or ~NAME at its start, which a shell leaves in --flag=~/x.

    Raises:
      UserError: where no user has this name, because a folder that is called ~NAME would be made.
    """
    if not path.startswith("~"):
        return path
    home = os.path.expanduser(path)
    if home.startswith("~") and not os.path.lexists(path):
        raise UserError(f"{path} begins with ~, and there is no such home folder: write ./{path} for a file there.")
    return home


def with_homes(settings: Settings) -> Settings:
    """The same dataclass, its groups included, with ~ `expanded` in every field that is one place or a Path."""
    hints, changes = get_type_hints(type(settings), include_extras=True), dict[str, Any]()
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_homes(value)
        elif isinstance(value, Path):
            changes[field.name] = Path(expanded(str(value)))
        elif _PLACE in _marks(hints[field.name]) and _SEVERAL not in _marks(hints[field.name]):
            changes[field.name] = expanded(value)
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def place_fields(kind: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """The dotted names of the fields of a dataclass, its groups included, that are places; and how each is marked."""
    fields: dict[str, tuple[str, ...]] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            fields |= place_fields(hint, f"{prefix}{name}.")
        elif _PLACE in _marks(hint):
            fields[prefix + name] = _marks(hint)
    return fields


def absolute(path: str, marks: tuple[str, ...]) -> str:
    """A place as it is written down: absolute where something lies there, so that it is found from anywhere."""
    if _SEVERAL in marks or not path or not os.path.exists(path):
        return path
    is_name = _OR_NAME in marks and (os.path.isdir(path) or not Path(path).suffix)
    return path if is_name else os.path.abspath(path)


def same_place(one: str, other: str) -> bool:
    """Whether two texts are equal, or paths of the same file or folder, there or not."""
    return one == other or os.path.realpath(expanded(one)) == os.path.realpath(expanded(other))


def _marks(hint: Any) -> tuple[str, ...]:
    if get_origin(hint) is not Annotated:
        return ()
    return tuple(mark for mark in get_args(hint)[1:] if isinstance(mark, str))
