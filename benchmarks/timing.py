"""The least time of a few runs, in this process's wall and CPU-seconds."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

FEWEST = 3  # runs, after the first one, which still touches memory for the first time


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compiled(lower: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `lower` gives, compiled; and what that took."""
    begun, cpu_begun = time.perf_counter(), cpu_s()
    program = lower().compile()
    return program, {
        "compile_s": round(time.perf_counter() - begun, 2),
        "compile_cpu_s": round(cpu_s() - cpu_begun, 2),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def least(run: Callable[[], Any], budget_s: float, unit: str) -> tuple[Any, dict[str, float]]:
    """Runs until the budget is spent, and four times at least: (the first result, the others' least and median).

    Args:
      run: returns when everything is done. unit: what is run, for the figures' names.
    """
    first, wall, cpu, ended = run(), [], [], time.perf_counter() + budget_s
    while len(wall) < FEWEST or time.perf_counter() < ended:
        cpu_before, before = cpu_s(), time.perf_counter()
        run()
        wall.append(time.perf_counter() - before)
        cpu.append(cpu_s() - cpu_before)
    return first, {
        f"{unit}s": len(wall),
        f"wall_s_per_{unit}": min(wall),
        f"median_wall_s_per_{unit}": statistics.median(wall),
        f"cpu_s_per_{unit}": min(cpu),
    }
