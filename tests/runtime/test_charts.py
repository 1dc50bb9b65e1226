"""Charts: a curve ends at its value, labels keep apart, ticks are few and even."""

from __future__ import annotations

import itertools

import pytest

from jeagle.runtime.charts import plot, ticks


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])  # so that the ends crowd at the top, in the middle, at the bottom
def test_a_curve_ends_at_its_value_and_labels_keep_apart(start):
    ends = {f"accuracy_{k}": 0.5 + k / 1000 for k in range(7)}
    rows = [{"step": 10} | dict.fromkeys(ends, start), {"step": 20} | ends]
    drawn = plot(rows, {name: str(k + 1) for k, name in enumerate(ends)})
    places = sorted(curve.label_y for curve in drawn.curves)
    assert all(b - a >= 8 for a, b in itertools.pairwise(places)) and places[0] >= 0 and places[-1] <= 100
    assert [c.label for c in sorted(drawn.curves, key=lambda c: c.label_y)] == list("7654321")  # as the lines lie
    assert [curve.last for curve in drawn.curves] == list(ends.values())


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 0.43), (1, 1), (5.2, 21.3), (-3, 3), (0, 1e6), (20.24, 20.25)])
def test_ticks_are_few_even_and_hold_the_range(low, high):
    found = ticks(low, high)
    gaps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert found[0] <= low and found[-1] >= high and len(gaps) == 1 and 3 <= len(found) <= 8
