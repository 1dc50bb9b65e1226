"""Which layers of a target lie stacked, so that one of each kind is compiled and scanned over."""

from __future__ import annotations

from typing import NamedTuple

from jeagle.targets.model.spec import BlockSpec


class Group(NamedTuple):
    """Layers of one shape whose weights lie stacked: `layers` are their numbers."""

    block: BlockSpec
    layers: tuple[int, ...]


def runs(blocks: tuple[BlockSpec, ...], longest: int = 12) -> tuple[tuple[Group, ...], ...]:
    """The layers as few runs, each a short pattern of layers that repeats: what is compiled once and scanned over.

    Gemma 3's 26 layers, five with a window to one without, are one run of a pattern of 6, four times, and one of 2.
    Found by dynamic programming: the fewest pattern layers in all, then the fewest runs.
    """
    total = len(blocks)
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (total + 1)  # cost, runs, period, repeats from here on
    for start in reversed(range(total)):
        options = []
        for period in range(1, min(longest, total - start) + 1):
            pattern, repeats = blocks[start : start + period], 1
            while blocks[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            for times in {1, repeats}:
                rest = best[start + period * times]
                options.append((period + rest[0], 1 + rest[1], period, times))
        best[start] = min(options)
    found, start = [], 0
    while start < total:
        _, _, period, times = best[start]
        found.append(
            tuple(
                Group(blocks[start + j], tuple(range(start + j, start + period * times, period))) for j in range(period)
            )
        )
        start += period * times
    return tuple(found)
