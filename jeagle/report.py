"""`python -m jeagle.report --run runs/NAME`: what a run reached, on one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import tyro

from jeagle.errors import UserError
from jeagle.run.claim import PAGE, REPORT
from jeagle.runtime import cli
from jeagle.runtime.charts import is_number, plot, ticks
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.outputs import check_replaceable

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes report.html of a run anew, from its report.json and metrics.jsonl."""

    run: Path
    """The run's folder, runs/NAME."""


def main(arguments: list[str]) -> None:
    folder = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.report").run
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
    report = _finite(report)
    tree = report | ({"sample": sample} if sample else {})
    text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render(report, read_metrics(run / "metrics.jsonl"), sample)
    check_replaceable(run / "report.html", PAGE)
    atomic_write(run / "report.json", text, REPORT)
    atomic_write(run / "report.html", page, PAGE)
    return run / "report.html"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps, rising; none without a file. A line that a killed process left half written is passed over."""
    rows = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[step] for step in sorted(rows)]


def mean_logged(run: Path, name: str) -> float | None:
    """The mean of a figure over a run's logged steps; None where it was not logged."""
    values = [row[name] for row in read_metrics(run / "metrics.jsonl") if is_number(row.get(name))]
    return sum(values) / len(values) if values else None


def render(report: Report, metrics: list[dict[str, Any]], sample: dict[str, Any] | None) -> str:
    """The page, which asks for nothing from outside it."""
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.ChainableUndefined
    page = jinja2.Environment(loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"shown": shown, "duration": _duration, "shell": cli.shell_word, "json": json.dumps}
    page.tests["known"] = is_number
    positions = sorted({int(k[9:]) for row in metrics for k in row if k.startswith("accuracy_")})
    return page.get_template("report.html.jinja").render(
        report=report,
        headline=headline(report),
        doubtful=report.get("lossless") is False or _behind_ngram(report),
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
    if after is None:
        return "", f"The acceptance length was not measured; {_text_equality(report)}."
    than = f", {_gap(after, ngram)} than a 3-gram table of the same answers" if ngram is not None else ""
    return f"{after:.2f}", f"tokens a target step{than}; {_text_equality(report)}."


def shortfalls(report: Report, metrics: list[dict[str, Any]]) -> list[str]:
    """What must be known before the figures are taken for a success; empty when all is well."""
    after, _, before = _lengths(report)
    broken = sum(not is_number(row.get("loss")) for row in metrics)
    agree, _, of = str(report.get("regenerated_agree") or "").partition("/")
    missing = [name for name in ("SGLang", "vLLM") if name.lower() not in (report.get("exports") or {})]
    found = {
        "Not lossless: a draft may never change the text, so no other figure counts until this is mended.": (
            report.get("lossless") is False
        ),
        "The draft accepts less than a table that never saw the target's features: it is not worth serving yet.": (
            _behind_ngram(report)
        ),
        "Training did not raise the acceptance length.": after is not None and before is not None and after <= before,
        f"The loss was not a number in {broken} of {len(metrics)} logged steps.": broken > 0,
        f"Only {agree} of {of} answers made again agree with the ones trained on.": agree != of,
        f"There is no export for {' or '.join(missing)}.": bool(missing),
    }
    return [sentence for sentence, holds in found.items() if holds]


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
        + ([] if after is None or ngram is None else [f"{_gap(after, ngram)} than a 3-gram table's {ngram:.3f}"]),
        "by position": _named(report, acceptance_by_position="{}"),
        "text": [_text_equality(report).removeprefix("text ")],
        "exports": [str(folder) for folder in (report.get("exports") or {}).values()],
        "time": [f"{_duration(sum(stages.values()))} in all"] * bool(stages)
        + [f"{name} {_duration(s)}" for name, s in stages.items()],
        "peak memory": _named(report, peak_rss_bytes="{}"),
    }
    return {name: ", ".join(parts) for name, parts in lines.items() if parts}


def _named(report: Report, **patterns: str) -> list[str]:
    texts = {name: shown(report.get(name), name) for name in patterns}
    return [patterns[name].format(text) for name, text in texts.items() if text]


def _text_equality(report: Report) -> str:
    if report.get("lossless") is None:
        return "text not compared with plain greedy decoding"
    if not report["lossless"]:
        return "text NOT identical to plain greedy decoding"
    prompts, ties = report.get("prompts_measured") or 0, report.get("excused_ties") or 0
    but = f" but for {ties} near-tie{'s' * (ties > 1)} of the target's best two logits" if ties else ""
    return f"text identical to plain greedy decoding on {prompts} of {prompts} prompts{but}"


def _behind_ngram(report: Report) -> bool:
    after, ngram, _ = _lengths(report)
    return after is not None and ngram is not None and after < ngram


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


def _lengths(report: Report) -> list[float | None]:
    """Acceptance lengths after training, of the 3-gram table and before training; None where not measured."""
    found = [report.get(f"acceptance_length_{kind}") for kind in ("after", "ngram", "before")]
    return [value if is_number(value) else None for value in found]


def _finite(tree: Any) -> Any:
    """JSON has no NaN: such a figure becomes null, one that is not known."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


if __name__ == "__main__":
    cli.run(main)
