"""Settings of the host process that must stand before JAX starts its work."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_ALIGNMENT = 64


def prepare_host() -> None:
    """Keeps freed memory in the process, and compiled programs in the user's cache.

    XLA's CPU backend allocates its temporary buffers anew on every call. glibc hands large ones back to the system each
    time, so that every call pays for zeroing and mapping fresh pages: on two cores a step of a 135M-parameter target
    took 2 to 4 times as long. XLA's threads must share one arena: the arenas that glibc makes for further threads
    cannot hold blocks of 64 MiB and more, whatever the thresholds, and map those anew each time.
    """
    keep_freed_memory(largest=1 << 30, most=(1 << 31) - 1)
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("JEAGLE_CACHE") or Path.home() / ".cache" / "jeagle") / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def keep_freed_memory(*, largest: int, most: int) -> None:
    """Keeps blocks of up to `largest` bytes in the process once they are freed, `most` bytes in all at its end."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, largest)
            libc.mallopt(_TRIM_THRESHOLD, most)
            libc.mallopt(_ARENA_MAX, 1)
        except (AttributeError, OSError):
            pass  # another C library: slower, not wrong


def release_freed_memory() -> None:
    """Hands back to the system what `keep_freed_memory` has kept until now, wherever in the heap it lies."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that JAX's CPU backend uses as it lies: it copies what is not aligned to 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
