"""One writer at a time: a lock file that says who holds it and that the system frees when its holder dies."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.runtime.host import is_alive
from jeagle.runtime.outputs import parents_made

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
_held: set[Path] = set()


@contextlib.contextmanager
def only_writer(lock: Path, what: str, advice: str, *, shared: bool = False) -> Iterator[None]:
    """While the block runs, no other process enters one of the same lock file.

    The file is made, with the folders above it, and removed after the block. The system frees the lock of a process
    that is killed, and the file that it left is taken over. A process may enter blocks of one lock within each other.
    On a disk that cannot lock files the content of the file decides.

    Args:
      what, advice: the beginning of the message and its end, what to do.
      shared: the block may run beside other shared ones.

    Raises:
      UserError: that names the process which holds the lock, its host, and since when.
    """
    key = lock.absolute()
    if key in _held:
        yield
        return
    with parents_made(lock, keep=False):
        descriptor = _taken(lock, what, advice, shared)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            with contextlib.suppress(OSError):  # the file goes before the lock does, unless others share it
                if shared:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file(descriptor, lock):
                    lock.unlink()
            os.close(descriptor)


def _taken(lock: Path, what: str, advice: str, shared: bool) -> int:
    not_ours = f"{lock} is there already and is no lock of jeagle's: nothing has been changed. Move it away."
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except IsADirectoryError:
            raise UserError(not_ours) from None
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder, unlockable = _holder(descriptor), error.errno in _NO_LOCKS
            if not unlockable or (_may_live(holder) and not shared):
                os.close(descriptor)
                dead = f" If that process has ended, remove {lock}." if unlockable else ""
                who = "process {pid} on host {host}, since {since}" if holder else "which has only just begun"
                who = who.format_map({"pid": None, "host": None, "since": None} | holder)
                raise UserError(f"{what} is in use by another process ({who}): {advice}{dead}") from None
        if _is_file(descriptor, lock):
            break
        os.close(descriptor)  # its holder removed it between the two calls: the name is another file's by now, or free
    if os.fstat(descriptor).st_size and "pid" not in _holder(descriptor):
        os.close(descriptor)
        raise UserError(not_ours)
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": Path(sys.argv[0]).name}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
    return descriptor


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, Any]:
    """What the file says of the process that holds it; empty while that one is about to write it."""
    try:
        tree = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether the holder is alive, as far as this host can tell: of a process on another one it cannot."""
    if not holder or holder.get("pid") == os.getpid():
        return False
    try:
        return holder.get("host") != socket.gethostname() or is_alive(int(holder["pid"]))
    except ValueError:
        return False
