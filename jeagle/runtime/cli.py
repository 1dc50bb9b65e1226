"""How a command ends: with a sentence where the user can help, a traceback where only a programmer can.

Also how it writes another command down for the user.
"""

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from jeagle.errors import UserError
from jeagle.runtime.disk import full_disk

USER_ERROR = 2
INTERRUPTED = 128 + 2  # as shells count SIGINT
BROKEN_PIPE = 128 + 13  # as shells count SIGPIPE


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls main with the process's arguments and exits with what it returns (None is 0).

    A UserError, or a full disk, becomes `error: ...` on stderr and status 2, Ctrl-C one line and 130, a reader that
    went away a quiet 141, any other exception a traceback and 1. SystemExit passes through. In a run of several
    processes one that fails leaves at once, because waiting for the others, as jax does at exit, would hang them all.
    """
    status = _status(main)
    jax = sys.modules.get("jax")  # a command that has not imported it is not made to
    if status and jax is not None and jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def shell_word(value: object) -> str:
    """A path or another value as a word of a shell's command line: quoted, and never taken for an option.

    A value that begins with a dash is written as the path ./VALUE, which names the same file.
    """
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _status(main: Callable[[list[str]], int | None]) -> int:
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        _say(f"error: {error}")
        return USER_ERROR
    except KeyboardInterrupt:
        _say("\ninterrupted: the same command goes on from what it has finished.")
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        _say(str(leave.code))
        return 1
    except Exception as error:
        place = Path(getattr(error, "filename", None) or ".")
        if full := full_disk(error, place, "A file", "make room, and start the same command again"):
            _say(f"error: {full}")
            return USER_ERROR
        traceback.print_exc()
        return 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
