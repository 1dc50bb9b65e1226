"""`python -m jeagle.report --run runs/NAME`: what a run reached, on one self-contained page."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jinja2
import tyro

from jeagle.errors import UserError
from jeagle.run.claim import PAGE, REPORT
from jeagle.runtime import cli
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_replaceable
from jeagle.runtime.trackers import is_number, read_metrics

Report = dict[str, Any]
Points = list[tuple[float, float]]
POINTS = 240  # of a curve; more would not be seen
LABEL_ROOM = 8.5  # percent of a chart's height that a line of text takes


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Writes report.html of a run again, from its report.json and metrics.jsonl."""

    run: Annotated[Path, tyro.conf.arg(aliases=("--draft", "--checkpoint"))]
    """The folder of the run, runs/NAME."""


def main(arguments: list[str]) -> None:
    folder = cli.parse(ReportArguments, arguments, program="python -m jeagle.report").run
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{folder} has no report.json: python -m jeagle.pipeline measures a run and writes it.")
    try:
        report = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no report ({error}): python -m jeagle.pipeline writes it again.") from None
    print(write_report(folder, report, report.pop("sample", None)))


def write_report(run: Path, report: Report, sample: dict[str, Any] | None) -> Path:
    """Writes report.json and report.html into a run's folder, each whole or not at all.

    Args:
      report: figures by name: lengths in tokens, shares from 0 to 1; beside them stage_seconds {name: seconds} and
        exports {engine: path}. Any may be missing.
      sample: {"prompt", "tokens": [{"text", "source": "target" | "draft", "round"}]}; report.json keeps it.

    Returns:
      The page's path.
    """
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN: not known
    tree = report | ({"sample": sample} if sample else {})
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render(report, read_metrics(run), sample)
    check_replaceable(run / "report.html", PAGE)
    atomic_write(run / "report.json", text, REPORT)
    atomic_write(run / "report.html", page, PAGE)
    return run / "report.html"


def mean_logged(run: Path, name: str) -> float | None:
    """The mean of a figure over a run's logged steps; None where it was not logged."""
    values = [row[name] for row in read_metrics(run) if is_number(row.get(name))]
    return sum(values) / len(values) if values else None


def render(report: Report, metrics: list[dict[str, Any]], sample: dict[str, Any] | None) -> str:
    """The page, which asks for nothing from outside it."""
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.ChainableUndefined
    page = jinja2.Environment(loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"shown": shown, "duration": _duration, "shell": cli.shell_word, "json": json.dumps}
    page.tests["known"] = is_number
    after, ngram, _ = _lengths(report)
    positions = sorted({int(k[9:]) for row in metrics for k in row if k.startswith("accuracy_")})
    return page.get_template("report.html.jinja").render(
        report=report,
        headline=headline(report),
        doubtful=report.get("lossless") is False or after < ngram,
        shortfalls=shortfalls(report, metrics),
        summary=_summary(report),
        stages=_stages(report),
        ticks=ticks,
        accuracy=plot(metrics, {f"accuracy_{k}": str(k + 1) for k in positions}),
        expected=plot(metrics, {"expected_acceptance_length": ""}),
        loss=plot(metrics, {"loss": ""}),
        sample=sample if sample and sample.get("tokens") else None,
    )


def headline(report: Report) -> tuple[str, str]:
    """(the main figure, what it means): one sentence in two parts, which says a shortfall as plainly as a success."""
    after, ngram, _ = _lengths(report)
    if math.isnan(after):
        return "", f"The acceptance length was not measured; {_text_equality(report)}."
    than = "" if math.isnan(ngram) else f", {_gap(after, ngram)} than a 3-gram table of the same answers"
    return f"{after:.2f}", f"tokens a target step{than}; {_text_equality(report)}."


def shortfalls(report: Report, metrics: list[dict[str, Any]]) -> list[str]:
    """What must be known before the figures are taken for a success; empty when all is well."""
    after, ngram, before = _lengths(report)
    broken = sum(not is_number(row.get("loss")) for row in metrics)
    agree, _, of = str(report.get("regenerated_agree") or "").partition("/")
    missing = [name for name in ("SGLang", "vLLM") if name.lower() not in (report.get("exports") or {})]
    possible = {
        "Not lossless: a draft may never change the text, so no other figure counts until this is mended.": (
            report.get("lossless") is False
        ),
        "The draft accepts less than a table that never saw the target's features: it is not worth serving yet.": (
            after < ngram
        ),
        "Training did not raise the acceptance length.": after <= before,
        f"The loss was not a number in {broken} of {len(metrics)} logged steps.": broken > 0,
        f"Only {agree} of {of} answers made again agree with the ones trained on.": agree != of,
        f"There is no export for {' or '.join(missing)}.": bool(missing),
    }
    return [sentence for sentence, holds in possible.items() if holds]


def summary_lines(report: Report) -> list[str]:
    """At most ten lines for a terminal: the figures that the page opens with."""
    return [f"{name:<19}{text}" for name, text in _summary(report).items()]


def _summary(report: Report) -> dict[str, str]:
    """Lines by name; what is not known is left out."""
    after, ngram, _ = _lengths(report)
    stages = _stages(report)
    lines = {
        "target": _named(report, target="{}"),
        "draft": _named(report, draft_parameters="{} parameters", draft_vocab="vocabulary of {}"),
        "trained on": _named(report, train_tokens="{} tokens", supervised_tokens="{} in answers", steps="{} steps")
        + _named(report, read_share="{} of rows read from a store, the others computed"),
        "acceptance length": _named(report, acceptance_length_before="{} before", acceptance_length_after="{} after")
        + ([] if math.isnan(after - ngram) else [f"{_gap(after, ngram)} than a 3-gram table's {ngram:.3f}"]),
        "by position": _named(report, acceptance_by_position="{}"),
        "text": [_text_equality(report).removeprefix("text ")],
        "exports": [str(folder) for folder in (report.get("exports") or {}).values()],
        "time": [f"{_duration(sum(stages.values()))} in all"] * bool(stages)
        + [f"{name} {_duration(s)}" for name, s in stages.items()],
        "peak memory": _named(report, peak_rss_bytes="{}"),
    }
    return {name: ", ".join(parts) for name, parts in lines.items() if parts}


def _named(report: Report, **patterns: str) -> list[str]:
    return [pattern.format(text) for name, pattern in patterns.items() if (text := shown(report.get(name), name))]


def _text_equality(report: Report) -> str:
    if report.get("lossless") is None:
        return "text not compared with plain greedy decoding"
    if not report["lossless"]:
        return "text NOT identical to plain greedy decoding"
    prompts, ties = report.get("prompts_measured") or 0, report.get("excused_ties") or 0
    but = f" but for {ties} near-tie{'s' * (ties > 1)} of the target's best two logits" if ties else ""
    return f"text identical to plain greedy decoding on {prompts} of {prompts} prompts{but}"


def _gap(after: float, ngram: float) -> str:
    return f"{abs(after - ngram):.2f} {'more' if after >= ngram else 'FEWER'}"


def shown(value: Any, name: str = "") -> str:
    """A figure as people read it; empty for what is not known."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part, key)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(shown(part) or "?" for part in value)
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not is_number(value):
        return value if isinstance(value, str) else ""
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    if name == "read_share":
        return f"{value:.0%}"
    if name.startswith("vocab_coverage"):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _stages(report: Report) -> dict[str, float]:
    return {name: s for name, s in (report.get("stage_seconds") or {}).items() if is_number(s)}


def _lengths(report: Report) -> list[float]:
    """Acceptance lengths after training, of the 3-gram table and before training; not a number where not measured."""
    lengths: list[Any] = [report.get(f"acceptance_length_{kind}") for kind in ("after", "ngram", "before")]
    return [value if is_number(value) else math.nan for value in lengths]


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
    lines: dict[str, Points] = {}
    for name in names:
        if points := [(row["step"], row[name]) for row in metrics if is_number(row.get(name))]:
            size = -(-len(points) // POINTS)  # so many neighbours become their mean
            groups = [points[i : i + size] for i in range(0, len(points), size)]
            lines[name] = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
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


if __name__ == "__main__":
    cli.run(main)
