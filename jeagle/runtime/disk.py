"""A disk that is full, or would be: one sentence with numbers, where possible before anything is written."""

import errno
import shutil
from pathlib import Path

from jeagle.errors import UserError

_SIGNS_OF_FULL = ("No space left", "os_error_code='28'", "Disk quota")


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path, whether or not it exists yet."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def is_full(error: BaseException) -> bool:
    """Whether an error of the system's or of tensorstore's, or its cause, means a full disk or quota."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # XLA says the same of memory, and raises a RuntimeError.
    known = known or ("RESOURCE_EXHAUSTED" in str(error) and not isinstance(error, RuntimeError))
    cause = error.__cause__ or error.__context__
    return known or any(sign in str(error) for sign in _SIGNS_OF_FULL) or (cause is not None and is_full(cause))


def check_room(path: Path, needed: int, what: str, advice: str) -> None:
    """UserError where the disk of `path` has less than `needed` bytes free; `what` needs them."""
    if needed > (free := free_bytes(path)):
        raise UserError(f"{what} needs {_size(needed)}, and the disk of {path} has {_size(free)} free: {advice}.")


def full_disk(error: BaseException, path: Path, what: str, advice: str) -> UserError | None:
    """The sentence for an error that means a full disk; None for any other error."""
    if not is_full(error):
        return None
    return UserError(f"{what} cannot be written, the disk of {path} is full, {_size(free_bytes(path))} free: {advice}.")


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.3f} MB"
