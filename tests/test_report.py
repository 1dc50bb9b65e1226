"""The page says what was measured, hides no shortfall, escapes what models write, and needs nothing from outside."""

import html
import itertools
import json
import math
import re

import pytest

from jeagle import report as command
from jeagle.errors import UserError
from jeagle.exchange import Export, ExportCard, model_card
from jeagle.interfaces import DraftSpec
from jeagle.report import headline, mean_logged, plot, shortfalls, summary_lines, ticks, write_report
from jeagle.runtime.trackers import read_metrics

REPORT = {
    "target": "pypi:some-model==1.2",
    "draft_parameters": 9437184,
    "draft_vocab": 8192,
    "vocab_coverage_train": 0.9981,
    "vocab_coverage_held_out": 0.9876,
    "train_tokens": 412873,
    "supervised_tokens": 317645,
    "steps": 1200,
    "acceptance_length_before": 1.004,
    "acceptance_length_after": 1.721,
    "acceptance_length_ngram": 1.508,
    "acceptance_by_position": [0.431, 0.178, 0.112],
    "acceptance_by_position_before": [0.004, 0.0, 0.0],
    "acceptance_by_position_ngram": [0.312, 0.118, 0.078],
    "lossless": True,
    "excused_ties": 0,
    "prompts_measured": 64,
    "exports": {"sglang": "runs/x/exports/sglang", "vllm": "runs/x/exports/vllm"},
    "stage_seconds": {"prepare": 2.4, "train": 402.7},
    "peak_rss_bytes": 1964947538,
    "regenerated_agree": "16/16",
    "versions": {"jeagle": "0.1.0", "jax": "0.10.2"},
    "machine": "two cores",
    "command": "python -m jeagle.pipeline --config some.py",
    "a_figure_nobody_foresaw": 271828,
}
SAMPLE = {
    "prompt": "Compare <b>x</b> & y",
    "tokens": [
        {"text": "<script>alert(1)</script>", "source": "target", "round": 0},
        {"text": " a\n\n  b", "source": "draft", "round": 1},
        {"text": '"', "source": "target", "round": 1},
    ],
}


def metrics(steps: int) -> list[dict]:
    return [
        {
            "step": s,
            "loss": 20 / s,
            "accuracy_0": 1 - 1 / s,
            "accuracy_1": 0.5 - 0.5 / s,
            "expected_acceptance_length": 2.0,
        }
        for s in range(1, steps + 1)
    ]


def page_of(folder, report, sample=None, rows=()) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(folder, report, sample).read_text("utf-8")


def text_of(page: str) -> str:
    """What is read on the page: no style, no tags, single spaces."""
    body = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)
    return " ".join(html.unescape(body).split())


def test_every_figure_is_on_the_page(tmp_path):
    text = text_of(page_of(tmp_path, REPORT, SAMPLE, metrics(30)))
    expected = [
        "1.72",
        "1.721",
        "1.508",
        "1.004",
        "0.431",
        "0.118",
        "9,437,184",
        "8,192",
        "99.81%",
        "98.76%",
        "412,873",
    ]
    expected += [
        "317,645",
        "1,200",
        "16/16",
        "6.7 min",
        "1.83 GiB",
        "jax 0.10.2",
        "two cores",
        "271,828",
        REPORT["command"],
    ]
    assert [figure for figure in expected if figure not in text] == []
    assert "0.21 more than a 3-gram table" in text
    assert "identical to plain greedy decoding on 64 of 64 prompts" in text


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = page_of(tmp_path, REPORT, SAMPLE, metrics(30))
    assert not re.search(r"https?://|<script|<link|<img|@import|\bsrc=|url\(", page)


def test_what_models_and_users_write_is_escaped(tmp_path):
    hostile = REPORT | dict.fromkeys(("target", "machine", "command"), "<i onload='x'>&\"")
    hostile |= {"exports": {"sglang": "<u>"}, "stage_seconds": {"<s>": 1.0}, "<em>": "<em>"}
    page = page_of(tmp_path, hostile, SAMPLE, metrics(3))
    assert not re.search(r"<script|<b>x|<i onload|<u>|<s>|<em>", page)
    assert "Compare &lt;b&gt;x&lt;/b&gt; &amp; y" in page


def test_accepted_tokens_are_coloured_and_keep_their_whitespace(tmp_path):
    page = page_of(tmp_path, REPORT, SAMPLE)
    answer = re.search(r'<p class="answer">(.*?)</p>', page, re.S).group(1)
    spans = re.findall(r'<span( class="drafted")? title="round (\d+)[^"]*">(.*?)</span>', answer, re.S)
    assert [(bool(drafted), int(number)) for drafted, number, _ in spans] == [(False, 0), (True, 1), (False, 1)]
    texts = [html.unescape(re.sub("<[^>]*>", "", inner)) for *_, inner in spans]
    assert texts == [token["text"] for token in SAMPLE["tokens"]]
    assert spans[1][2].count("<i></i>\n") == 2  # a line break is seen even where nothing stands on its line
    assert re.search(r"\.answer \{[^}]*white-space: pre-wrap", page)


@pytest.mark.parametrize("missing", [*REPORT, None])
def test_a_report_lacking_a_figure_still_makes_a_page(tmp_path, missing):
    report = {name: value for name, value in REPORT.items() if name != missing} if missing else {}
    text = text_of(page_of(tmp_path, report, None, metrics(4)))
    assert "None" not in text and "nan" not in text.split() and "How the figures are defined" in text
    assert 1 <= len(summary_lines(report)) <= 10


def test_what_is_not_a_number_is_shown_as_not_known(tmp_path):
    nan = {name: math.nan for name, value in REPORT.items() if isinstance(value, float)}
    report = REPORT | nan | {"acceptance_by_position": [0.5, math.nan], "stage_seconds": {"train": math.inf}}
    text = text_of(page_of(tmp_path, report, None, [{"step": 1, "loss": math.nan}, *metrics(5)[1:]]))
    assert "The acceptance length was not measured" in text and not re.search(r"\b(nan|inf|None)\b", text)
    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert saved["acceptance_length_after"] is None and saved["acceptance_by_position"] == [0.5, None]
    assert not any(re.search(r"\b(nan|inf|None)\b", line) for line in summary_lines(report))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 1000])
def test_curves_of_any_length_stay_within_their_plot(tmp_path, steps):
    page = page_of(tmp_path, REPORT, None, metrics(steps))
    lines = [
        [tuple(map(float, p.split(","))) for p in points.split()] for points in re.findall(r' points="([^"]*)"', page)
    ]
    assert len(lines) == (6 if steps else 0)  # two accuracies; a mean and what was logged of length and loss
    assert all(0 <= x <= 100 and 0 <= y <= 100 for line in lines for x, y in line)
    assert all(2 <= len(line) <= 240 or steps == 1 for line in lines)
    assert page.count("No step was logged") == (0 if steps else 3)


def test_a_half_written_line_and_steps_logged_twice_are_put_right(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 9}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 4}\n{"step": 3, "lo'
    )
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 3), (2, 4)]
    assert read_metrics(tmp_path / "absent") == []


def test_success_reports_no_shortfall():
    assert shortfalls(REPORT, metrics(3)) == []


@pytest.mark.parametrize(
    ("change", "said", "in_headline"),
    [
        ({"lossless": False}, "Not lossless", "NOT identical"),
        ({"acceptance_length_after": 1.42}, "accepts less than a table", "0.09 FEWER than a 3-gram table"),
        ({"acceptance_length_after": 1.0}, "did not raise", "FEWER"),
        ({"regenerated_agree": "12/16"}, "12 of 16", ""),
        ({"exports": {"sglang": "x"}}, "no export for vLLM", ""),
    ],
)
def test_a_shortfall_is_said_in_plain_words(tmp_path, change, said, in_headline):
    report = REPORT | change
    assert any(said in sentence for sentence in shortfalls(report, []))
    assert in_headline in " ".join(headline(report))
    assert said in text_of(page_of(tmp_path, report))
    assert not in_headline or any(in_headline.split(" than")[0] in line for line in summary_lines(report))


def test_excused_ties_are_not_called_identical_without_a_word():
    words = headline(REPORT | {"excused_ties": 2})[1]
    assert "but for 2 near-ties" in words


def test_serve_commands_are_those_of_the_exports_model_card(tmp_path):
    spec = DraftSpec(
        target_width=8,
        width=8,
        target_vocab=16,
        draft_vocab=8,
        aux_layers=(2, 4, 5),
        heads=2,
        kv_heads=1,
        head_dim=4,
        mlp_width=8,
    )
    exports = {"sglang": "runs/it's x/sglang", "vllm": "runs/it's x/vllm"}
    for target in ("pypi:some-model==1.2", "org/model", "models/a b", "a.gguf"):
        page = html.unescape(page_of(tmp_path, REPORT | {"target": target, "exports": exports}))
        for engine, folder in (("SGLang", exports["sglang"]), ("vLLM", exports["vllm"])):
            export = Export(engine, "plain", "bfloat16", folder, spec, 8, ExportCard(target_ref=target))
            told = re.findall(r"```bash\n(.*?)\n```", model_card(export), re.S)[0]
            assert f"<pre>{told}</pre>" in page


def test_the_share_of_rows_that_were_read_is_the_mean_over_the_run(tmp_path):
    rows = [{"step": 1, "read_share": 0.25}, {"step": 2, "read_share": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = REPORT | {"read_share": mean_logged(tmp_path, "read_share")}
    assert "50% of rows read from a store" in "\n".join(summary_lines(report))
    assert mean_logged(tmp_path, "loss") is None and "read from" not in "\n".join(summary_lines(REPORT))


def test_the_summary_is_ten_lines_at_most_and_says_the_main_figures():
    lines = summary_lines(REPORT)
    assert len(lines) <= 10 and all("\n" not in line for line in lines)
    assert all(figure in "\n".join(lines) for figure in ("1.004", "1.721", "1.508", "0.431", "64 of 64", "1.83 GiB"))


def test_the_command_makes_the_same_page_again(tmp_path, capsys):
    page = page_of(tmp_path, REPORT, SAMPLE, metrics(9))
    before = (tmp_path / "report.json").read_text()
    (tmp_path / "report.html").unlink()
    command.main(["--run", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == page and (tmp_path / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "report.json"]


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_folder_without_a_report_is_a_users_error(tmp_path, content):
    if content:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"jeagle\.pipeline"):
        command.main(["--run", str(tmp_path)])


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
