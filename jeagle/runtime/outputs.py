"""How jeagle knows a file or folder that it wrote: it replaces and removes nothing else.

Every writer of `manifest.py` names the kind of its output, so that none can forget the check. Commands ask
`check_output` before they begin, which also tries whether the place can be written, so that a refusal comes before any
work.
"""

import contextlib
import gzip
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jeagle.errors import UserError

_SIGN_BYTES = 1 << 16  # of a page, in which its sign must stand
_SHOWN = 3  # names of a message
_MOMENT = 0.05  # seconds, far longer than two renames take
_TRIAL_BYTES = bytes(4096)  # a disk or a quota without room for them is full


class Output(NamedTuple):
    """A kind of file or folder that jeagle writes.

    Attributes:
      what: names it in messages, after "is no", such as "export of jeagle's".
      folder: whether it is a folder.
      foreign: why the file or folder at a path, which is not empty, is not of this kind; "" where jeagle wrote it.
      grows: whether it is added to where it lies; otherwise it is replaced whole.
      parts: kinds of what may lie in such a folder, by their path in it.
    """

    what: str
    folder: bool
    foreign: Callable[[Path], str]
    grows: bool = False
    parts: Mapping[str, "Output"] = MappingProxyType({})


def json_file(what: str, *fields: str, any_of: tuple[str, ...] = ()) -> Output:
    """A JSON object with all of `fields`, and with at least one of `any_of` where that is not empty."""

    def foreign(path: Path) -> str:
        return (
            ""
            if _has(path.read_bytes(), fields, any_of)
            else f"it is no JSON object with {', '.join((*fields, *any_of))}"
        )

    return Output(what, False, foreign)


def jsonl_file(what: str, *fields: str, any_of: tuple[str, ...] = ()) -> Output:
    """Lines of JSON, of which the first has these fields; a first line that was cut off need only begin with one."""

    def foreign(path: Path) -> str:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            try:
                line = file.readline()
            except (EOFError, OSError):  # not compressed, or cut off
                line = b""
        if _has(line, fields, any_of):
            return ""
        begins = any(line.startswith(f'{{"{name}"'.encode()) for name in (*fields, *any_of))
        cut_off = begins and not line.endswith(b"\n")
        return "" if cut_off else f"its first line is no JSON object with {', '.join((*fields, *any_of))}"

    return Output(what, False, foreign, grows=True)


def signed_file(what: str, *signs: bytes) -> Output:
    """A file near whose beginning one of these byte strings stands."""

    def foreign(path: Path) -> str:
        with open(path, "rb") as file:
            start = file.read(_SIGN_BYTES)
        return "" if any(sign in start for sign in signs) else "jeagle's sign is not in it"

    return Output(what, False, foreign)


def marked_folder(what: str, mark: str, kind: Output, names: tuple[str, ...]) -> Output:
    """A folder that holds the file `mark`, of this kind, and nothing but `names`: it is replaced whole.

    An empty `mark`, as a full disk or a power failure leaves it, counts too.
    """

    def foreign(path: Path) -> str:
        found = sorted(os.listdir(path))
        others = [name for name in found if name not in (mark, *names)]
        if others or mark not in found:
            return f"it holds {listed(others or found)}"
        return f"its {mark} is no {kind.what}" if _reason(path / mark, kind) else ""

    return Output(what, True, foreign)


def folder_of(what: str, parts: Mapping[str, Output], folders: Sequence[str] = ()) -> Output:
    """A folder that jeagle adds files to and never replaces whole.

    It holds at least one of `parts` (kinds by their path in it) that jeagle wrote, none that it did not write, and
    whatever else. One in which a writer has only begun is of this kind too.

    Args:
      folders: further names in it under which files are added, which say nothing of who made it.
    """
    inner = dict.fromkeys([*folders, *(os.path.dirname(name) for name in parts if "/" in name)], _FOLDER)

    def foreign(path: Path) -> str:
        begun = lambda name: name.startswith(".") and name.endswith((".partial", ".lock"))  # noqa: E731
        others = [name for name in sorted(os.listdir(path)) if not begun(name)]  # before `there`: writers may add to it
        there = {name: kind for name, kind in parts.items() if _is_there(path / name)}
        for name, kind in ({name: _FOLDER for name in inner if os.path.lexists(path / name)} | there).items():
            if reason := _reason(path / name, kind):
                return f"its {name} is no {kind.what}: {reason}"
        return "" if there or not others else f"it holds {listed(others)}"

    return Output(what, True, foreign, grows=True, parts={**inner, **parts})


_FOLDER = Output("folder", True, lambda path: "", grows=True)

NEW_FOLDER = Output("empty folder", True, lambda path: f"it holds {listed(sorted(os.listdir(path)))}")
"""A folder that is made once and never replaced."""


def check_replaceable(path: str | Path, kind: Output) -> None:
    """UserError unless `path` is absent, empty, or of this kind, so that writing there loses nothing of a user's."""
    path = Path(path)
    if _reason(path, kind):
        time.sleep(_MOMENT)  # another writer may just have been replacing it
    if reason := _reason(path, kind):
        raise UserError(
            f"{path} is there already and is no {kind.what} ({reason}): nothing has been changed. "
            "Give another place, or move it away."
        )


def check_output(path: str | Path, kind: Output) -> None:
    """`check_replaceable`, and UserError unless something can be written there, which is tried and leaves no trace."""
    path = Path(path)
    check_replaceable(path, kind)
    try:
        try:
            _try(path, kind)
        except FileNotFoundError:
            time.sleep(_MOMENT)  # another process may have removed a folder that it had made to try
            _try(path, kind)
    except (OSError, ValueError) as error:  # ValueError for a name that no file can have
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError | ValueError) -> UserError:
    """A sentence for the reason why `path` cannot be written."""
    tried = Path(getattr(error, "filename", None) or path).absolute()  # in a run's folder, one of several places
    where = tried if os.path.isfile(tried) else next(parent for parent in tried.parents if os.path.isdir(parent))
    return UserError(
        f"{path} cannot be written ({where}: {getattr(error, 'strerror', None) or error}): make room or get leave to "
        "write there, or give another place."
    )


def aside_start(path: Path) -> str:
    """How the names of siblings of `path` begin that writers on this machine use."""
    machine = "".join(c if c.isalnum() else "-" for c in socket.gethostname()) or "here"
    return f".{path.name}.{machine}."


def _try(path: Path, kind: Output) -> None:
    """OSError where an output of this kind cannot be written at `path`."""
    if not (kind.grows and path.exists()):
        with parents_made(path, keep=False):
            _try_file(path.with_name(f"{aside_start(path)}{os.getpid()}.old.partial"))  # the longest name of a writer's
    elif kind.folder:
        _try_file(path / f".tried.{os.getpid()}.partial")
        for name, part in kind.parts.items():
            if part.grows and (path / name).exists():
                _try(path / name, part)
    else:
        path.open("ab").close()


def _try_file(path: Path) -> None:
    try:
        path.write_bytes(_TRIAL_BYTES)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def parents_made(path: Path, *, keep: bool = True) -> Iterator[None]:
    """The folders above `path`, made for the block; those that are empty after it go again where it fails.

    Args:
      keep: leave them where the block succeeds.

    Raises:
      UserError: where one of them is a file.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((p for p in path.parents if os.path.lexists(p) and not p.is_dir()), error.filename)
        raise UserError(f"{path} cannot be written, because {file} is not a folder: give another place.") from error
    try:
        yield
        made = [] if keep else made
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def listed(names: list[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _reason(path: Path, kind: Output) -> str:
    if not os.path.lexists(path):
        return ""
    try:
        if kind.folder:
            if not path.is_dir():
                return "it is a file, where a folder belongs"
            return kind.foreign(path) if any(path.iterdir()) else ""
        if not path.is_file():
            return "it is a folder" if path.is_dir() else "it is no ordinary file"
        return kind.foreign(path) if path.stat().st_size else ""
    except OSError as error:
        return f"it cannot be read: {error.strerror}" if os.path.lexists(path) else ""  # another writer moved it


def _is_there(path: Path) -> bool:
    """Whether something lies there that is not empty: an empty folder or file says nothing of who made it."""
    if path.is_dir():
        return any(path.iterdir())
    return os.path.lexists(path) and not (path.is_file() and not path.stat().st_size)


def _has(text: bytes, fields: tuple[str, ...], any_of: tuple[str, ...]) -> bool:
    """Whether this is a JSON object with all of `fields`, and with one of `any_of` if there are any."""
    try:
        tree = json.loads(text)
    except ValueError:
        return False
    return isinstance(tree, dict) and tree.keys() >= {*fields} and (not any_of or not tree.keys().isdisjoint(any_of))
