"""The host process: settings that must stand before JAX starts its work, and how much memory is free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jeagle.places import expanded

if TYPE_CHECKING:
    from jax.sharding import Mesh

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_ALIGNMENT = 64
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; a container sees its own


def prepare_host(*, devices: bool = True) -> None:
    """Keeps freed memory in the process, and compiled programs in the user's cache; opens the devices.

    XLA's CPU backend allocates its temporary buffers anew on every call. glibc hands large ones back to the system each
    time, so that every call pays for zeroing and mapping fresh pages: on two cores a step of a 135M-parameter target
    took 2 to 4 times as long. XLA's threads must share one arena: the arenas that glibc makes for further threads
    cannot hold blocks of 64 MiB and more, whatever the thresholds, and map those anew each time.

    Args:
      devices: whether the command computes on them.

    Raises:
      UserError: for devices that are missing or busy.
    """
    keep_freed_memory(largest=1 << 30, most=(1 << 31) - 1)
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
    if devices:
        from jeagle.runtime import distributed

        if distributed.devices_known():
            distributed.open_devices()


def cache_folder() -> Path:
    """JEAGLE_CACHE, or jeagle under XDG_CACHE_HOME, or ~/.cache/jeagle: for downloads and compiled programs."""
    if given := os.environ.get("JEAGLE_CACHE"):
        return Path(expanded(given))
    return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "jeagle"


def keep_freed_memory(*, largest: int, most: int) -> None:
    """Keeps blocks of up to `largest` bytes in the process once they are freed, `most` bytes in all at its end."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library: slower, not wrong
            libc = ctypes.CDLL(None)
            for setting, value in ((_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, most), (_ARENA_MAX, 1)):
                libc.mallopt(setting, value)


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


def free_bytes(mesh: Mesh) -> int | None:
    """Of the fullest of this process's devices in the mesh; None where nobody knows.

    CPU devices share what the system has available.
    """
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        host = host_bytes_available()
        return None if host is None else host // len(devices)
    stats = [device.memory_stats() for device in devices]
    if not all(s and "bytes_limit" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)


def host_bytes_available() -> int | None:
    """What the system, or the container's own limit, still gives without swapping; None where it does not say."""
    known = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        known.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # no such files, or the limit is "max"
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        known.append(limit - used + int(stat.get("inactive_file", 0)))  # pages of files are given up first
    return min(known, default=None)


def is_alive(process: int) -> bool:
    """Whether a process of this host is alive, whoever owns it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
