"""Line charts as numbers in percent of their plot, for a template to draw."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

Points = list[tuple[float, float]]
POINTS = 240  # of a curve; more would not be seen
LABEL_ROOM = 8.5  # percent of a chart's height that a line of text takes


class Curve(NamedTuple):
    """A line of a chart: points "x,y x,y ..." and heights in percent of the plot, from its top left.

    Attributes:
      label: its name; empty where the chart's title says it.
      last: its last value.
      logged, mean: as logged (thinned), and the running mean.
      end, label_y: height of its end, and of its label, which keeps clear of the others'.
    """

    label: str
    last: float
    logged: str
    mean: str
    end: float
    label_y: float


class Plot(NamedTuple):
    """Curves over one pair of axes; ticks are (percent, text)."""

    curves: list[Curve]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def plot(metrics: list[dict[str, Any]], names: dict[str, str]) -> Plot | None:
    """The curves of the named figures (name -> label) over steps; None where none of them has a number."""
    found = {name: [(row["step"], row[name]) for row in metrics if is_number(row.get(name))] for name in names}
    lines = {name: _thinned(points) for name, points in found.items() if points}
    if not lines:
        return None
    values, right = [y for points in lines.values() for _, y in points], max(p[-1][0] for p in lines.values()) or 1
    up = ticks(min(values), max(values))

    def height(value: float) -> float:
        return round(100 * (up[-1] - value) / (up[-1] - up[0]), 2)

    def path(points: Points) -> str:
        return " ".join(f"{round(100 * step / right, 2)},{height(value)}" for step, value in points)

    means = {name: _running_mean(points) for name, points in lines.items()}
    ends = [height(mean[-1][1]) for mean in means.values()]
    return Plot(
        [
            Curve(names[name], means[name][-1][1], path(lines[name]), path(means[name]), end, place)
            for name, end, place in zip(lines, ends, _apart(ends), strict=True)
        ],
        [(100 * step / right, f"{step:,.0f}") for step in ticks(0, right) if step <= right],
        [(height(value), f"{value:g}") for value in up],
    )


def ticks(low: float, high: float) -> list[float]:
    """A few round numbers, evenly spaced, whose range holds low and high."""
    span = max(high - low, 0.1 * abs(high), 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _thinned(points: Points) -> Points:
    """Means of as many neighbours as leave at most POINTS points."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _running_mean(points: Points) -> Points:
    half = len(points) // 16
    windows = [points[max(i - half, 0) : i + half + 1] for i in range(len(points))]
    return [(step, sum(y for _, y in near) / len(near)) for (step, _), near in zip(points, windows, strict=True)]


def _apart(ends: list[float]) -> list[float]:
    """Where labels go so that they do not lie on one another: near their lines' ends, in the same order."""
    order, places = sorted(range(len(ends)), key=lambda i: ends[i]), list(ends)
    for above, i in itertools.pairwise(order):
        places[i] = max(places[i], places[above] + LABEL_ROOM)
    limit = 100.0
    for i in reversed(order):
        places[i] = min(places[i], limit)
        limit = places[i] - LABEL_ROOM
    return places


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
