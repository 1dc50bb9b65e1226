"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; a container sees its own


def free_bytes(mesh: Mesh) -> int | None:
    """Of the fullest of this process's devices in the mesh; None where nobody knows.

    CPU devices share what the system has available.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        host = host_bytes_available()
        return None if host is None else host // len(devices)
    stats = [device.memory_stats() for device in devices]
    if not all(s and "bytes_limit" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)


def host_bytes_available() -> int | None:
    """What the system, or the container's own limit, still gives without swapping; None where it does not say."""
    found = [value for value in (_of_system(), _of_container()) if value is not None]
    return min(found) if found else None


def _of_system() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _of_container() -> int | None:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        held = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return limit - held + int(stat.get("inactive_file", 0))  # pages of files are given up first
    except (OSError, ValueError):  # no such files, or the limit is "max"
        return None
