"""`python -m jeagle.report --run runs/NAME`: what a run learnt, on one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import tyro

from jeagle.errors import UserError
from jeagle.runtime.cli import run
from jeagle.runtime.manifest import atomic_write

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 560, 240, 46, 30, 90, 12
_POINTS = 160  # of a curve; more would not be seen


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes report.html of a run from its report.json and metrics.jsonl."""

    run: Path
    """The run's folder, runs/NAME."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.report")
    path = args.run / "report.json"
    if not path.is_file():
        raise UserError(f"{args.run} has no report.json: python -m jeagle.pipeline writes it.")
    report = json.loads(path.read_text("utf-8"))
    print(write_report(args.run, report, report.get("sample")))


def write_report(folder: Path, report: dict[str, Any], sample: dict[str, Any] | None) -> Path:
    """Writes report.json and report.html into a run's folder; returns the page's path."""
    tree = report | {"sample": sample}
    atomic_write(folder / "report.json", json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    page = folder / "report.html"
    atomic_write(page, render(tree, read_metrics(folder / "metrics.jsonl")))
    return page


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def render(report: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """The page as HTML without any outside resource."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jeagle", "."), autoescape=True, undefined=jinja2.ChainableUndefined
    )
    accuracy = sorted({k for row in metrics for k in row if k.startswith("accuracy_")}, key=lambda k: int(k[9:]))
    charts = {
        "loss": _lines(metrics, {"loss": "loss"}),
        "accuracy": _lines(metrics, {k: f"position {int(k[9:]) + 1}" for k in accuracy}, low=0.0),
        "expected": _lines(metrics, {"expected_acceptance_length": "expected"}, low=1.0),
        "bars": _bars(report),
    }
    return environment.get_template("report.html.jinja").render(
        r=report, charts=charts, headline=headline(report), figures=figures(report), sample=report.get("sample")
    )


def headline(report: dict[str, Any]) -> str:
    """The main figure in words; a shortfall is said as plainly as a success."""
    after, ngram = report["acceptance_length_after"], report.get("acceptance_length_ngram")
    text = f"{after:.2f} tokens a target step"
    if ngram is not None:
        gap = after - ngram
        text += f", {abs(gap):.2f} {'more' if gap >= 0 else 'FEWER'} than a 3-gram table of the same answers"
    if not report.get("lossless"):
        return f"{text}. The text DIFFERS from plain greedy decoding: this draft's figures cannot be trusted."
    excused = report.get("excused_ties") or 0
    ties = f" ({excused} differ only where two logits tie)" if excused else ""
    return f"{text}; text equal to plain greedy decoding on all {report.get('prompts_measured', 0)} prompts{ties}."


def figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) rows of the table."""
    rows = [
        ("target", report.get("target")),
        ("draft parameters", report.get("draft_parameters")),
        ("draft vocabulary", report.get("draft_vocab")),
        ("vocabulary coverage, training answers", _percent(report.get("vocab_coverage_train"))),
        ("vocabulary coverage, held-out answers", _percent(report.get("vocab_coverage_held_out"))),
        ("training tokens", report.get("train_tokens")),
        ("of them answers", report.get("supervised_tokens")),
        ("optimiser steps", report.get("steps")),
        ("acceptance length before training", report.get("acceptance_length_before")),
        ("acceptance length after training", report.get("acceptance_length_after")),
        ("acceptance length of a 3-gram table", report.get("acceptance_length_ngram")),
        ("held-out prompts measured", report.get("prompts_measured")),
        ("lossless", None if report.get("lossless") is None else "yes" if report["lossless"] else "NO"),
        ("differences excused as ties", report.get("excused_ties")),
        ("answers made again that agree", report.get("regenerated_agree")),
        ("peak memory", _gigabytes(report.get("peak_rss_bytes"))),
    ]
    return [
        (name, f"{value:,}" if isinstance(value, int | float) else str(value))
        for name, value in rows
        if value is not None
    ]


def summary_lines(report: dict[str, Any]) -> list[str]:
    """At most ten lines for the terminal."""
    positions = " ".join(f"{share:.2f}" for share in report.get("acceptance_by_position", []))
    seconds = report.get("stage_seconds", {})
    lines = [
        f"target                {report['target']}",
        f"draft                 {report['draft_parameters']:,} parameters, {report.get('draft_vocab', 0):,} tokens",
        f"trained on            {report['train_tokens']:,} tokens ({report['supervised_tokens']:,} of answers) "
        f"in {report['steps']:,} steps",
        f"acceptance length     {report['acceptance_length_before']:.3f} before, "
        f"{report['acceptance_length_after']:.3f} after, {report['acceptance_length_ngram']:.3f} for a 3-gram table",
        f"accepted by position  {positions}",
        f"lossless              {'yes' if report['lossless'] else 'NO'}, {report['excused_ties']} excused ties, "
        f"{report['prompts_measured']} held-out prompts",
        f"exports               {', '.join(map(str, report['exports'].values()))}",
        f"time                  {sum(seconds.values()) / 60:.1f} min: "
        + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()),
        f"peak memory           {_gigabytes(report.get('peak_rss_bytes'))}",
    ]
    return lines


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _gigabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.2f} GiB"


def _lines(metrics: list[dict[str, Any]], names: dict[str, str], low: float | None = None) -> dict[str, Any] | None:
    """A line chart: paths, labels at their ends, and axis ticks. None without two points."""
    every = max(len(metrics) // _POINTS, 1)
    curves: dict[str, list[tuple[float, float]]] = {}
    for key, label in names.items():
        found = [(row["step"], row.get(key)) for row in metrics]
        points = [(float(x), float(y)) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]
        if len(points) > 1:
            curves[label] = _smoothed(points, every)
    if not curves:
        return None
    values = [y for points in curves.values() for _, y in points]
    bottom, top = min(values) if low is None else low, max(values)
    top = top if top > bottom else bottom + 1.0
    last = max(x for points in curves.values() for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x / last) * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_TOP + (top - y) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM), 1)

    drawn = []
    for number, (label, points) in enumerate(curves.items()):
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        drawn.append({"points": path, "label": label, "end": place(*points[-1]), "shade": number})
    ticks = [(place(0, y)[1], f"{y:.3g}") for y in (bottom + (top - bottom) * i / 4 for i in range(5))]
    return {"curves": _apart(drawn), "ticks": ticks, "last": f"{last:,.0f}", "width": _WIDTH, "height": _HEIGHT}


def _smoothed(points: list[tuple[float, float]], every: int) -> list[tuple[float, float]]:
    """Means of runs of steps, the noise of single batches taken out."""
    window = max(every, len(points) // 40, 1)
    return [
        (
            points[min(i + window, len(points)) - 1][0],
            sum(y for _, y in points[i : i + window]) / len(points[i : i + window]),
        )
        for i in range(0, len(points), window)
    ]


def _apart(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moves labels that would lie on one another."""
    floor = -100.0
    for curve in sorted(curves, key=lambda c: c["end"][1]):
        floor = max(curve["end"][1], floor + 14)
        curve["label_y"] = floor
    return curves


def _bars(report: dict[str, Any]) -> dict[str, Any] | None:
    """Acceptance by position, beside one another: before, after, 3-gram table."""
    kinds = {
        "before": "acceptance_by_position_before",
        "after": "acceptance_by_position",
        "3-gram": "acceptance_by_position_ngram",
    }
    series = {label: report[key] for label, key in kinds.items() if report.get(key)}
    if not series:
        return None
    positions = max(map(len, series.values()))
    group = (_WIDTH - _LEFT) / positions
    width = group * 0.8 / len(series)
    bars = []
    for number, (label, shares) in enumerate(series.items()):
        for position, share in enumerate(shares):
            height = share * (_HEIGHT - _TOP - _BOTTOM)
            x, y = _LEFT + position * group + number * width, _HEIGHT - _BOTTOM - height
            bars.append(
                {"x": round(x, 1), "y": round(y, 1), "w": round(width - 2, 1), "h": round(height, 1)}
                | {"kind": label, "share": share}
            )
    centres = [(round(_LEFT + (p + 0.4) * group, 1), p + 1) for p in range(positions)]
    return {
        "bars": bars,
        "centres": centres,
        "labels": list(series),
        "width": _WIDTH,
        "height": _HEIGHT,
        "base": _HEIGHT - _BOTTOM,
    }


if __name__ == "__main__":
    run(main)
