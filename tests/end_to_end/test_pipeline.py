"""The whole road on a tiny target: stages, reuse, exports, the report; and bench as a user calls it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests import tiny
from tests.end_to_end.test_train import ROOT, call, environment

SMALL = {
    "train__steps": 30,
    "train__learning_rate": 3e-3,
    "bench__max_prompts": 6,
    "bench__prompts_before": 3,
    "bench__max_new_tokens": 12,
    "bench__draft_tokens": 4,
    "bench__batch": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def first(folder):
    return call("pipeline", tiny.flags(folder, **SMALL))


def report(folder) -> dict:
    return json.loads((folder / "runs" / "tiny" / "report.json").read_text())


def test_the_report_says_what_happened(folder, first):
    found = report(folder)
    assert found["steps"] == 30 and found["lossless"] is True
    assert found["prompts_measured"] == 6 and len(found["acceptance_by_position"]) == 4
    for name in ("before", "after", "ngram"):
        assert 1.0 <= found[f"acceptance_length_{name}"] <= 5.0
    after = 1 + sum(found["acceptance_by_position"])
    assert found["acceptance_length_after"] == pytest.approx(after, abs=1e-3)
    assert found["train_tokens"] > found["supervised_tokens"] > 0 and found["peak_rss_bytes"] > 1e8
    page = (folder / "runs" / "tiny" / "report.html").read_text()
    assert f"{found['acceptance_length_after']:.2f}" in page
    assert "acceptance length" in first.stdout


def test_exports_read_back_and_lie_where_the_report_says(folder, first):
    for path in report(folder)["exports"].values():
        names = {p.name for p in (ROOT / path).iterdir()}
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert first.stdout.count("read back: logits within") == 2


def test_a_second_call_reuses_every_stage(folder, first):
    before = report(folder)
    again = call("pipeline", tiny.flags(folder, **SMALL))
    stages = [line for line in again.stdout.splitlines() if line.startswith("[")]
    assert len(stages) == 5 and all(line.endswith("as before") for line in stages)
    assert report(folder) == before | {
        "peak_rss_bytes": report(folder)["peak_rss_bytes"],
        "stage_seconds": report(folder)["stage_seconds"],
    }


def test_what_has_gone_or_is_empty_is_made_again(folder, first):
    run, before = folder / "runs" / "tiny", report(folder)
    exported = (run / "exports" / "vllm" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "exports" / "vllm")
    emptied = [path for path in (run / "checkpoints" / "30").rglob("*") if path.is_file()]
    for path in emptied:
        path.write_bytes(b"")
    again = call("pipeline", tiny.flags(folder, **SMALL))
    made = [line for line in again.stdout.splitlines() if line.startswith("[") and line.endswith("]")]
    assert emptied and made == ["[train]", "[export]"]  # the draft is the same, so that its measurement stays true
    assert (run / "exports" / "vllm" / "model.safetensors").read_bytes() == exported
    assert "checkpoints/30 cannot be read" in again.stdout and (run / "damaged" / "checkpoint_30.0").is_dir()
    same = ("acceptance_length_after", "exports", "steps", "train_tokens")
    assert {name: report(folder)[name] for name in same} == {name: before[name] for name in same}


def test_other_settings_do_not_overwrite_a_run(folder, first):
    done = call("pipeline", tiny.flags(folder, **SMALL | {"train__learning_rate": 1e-3}), status=2)
    assert "train.learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert report(folder)["steps"] == 30


def bench(folder, *arguments: str, status: int = 0):
    import subprocess
    import sys

    command = [sys.executable, "-m", "jeagle.bench", "--draft", str(folder / "runs" / "tiny"), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return done


def test_bench_measures_any_prompts(folder, first):
    prompts = folder / "prompts.jsonl"
    rng = np.random.default_rng(5)
    turns = [" ".join(rng.choice(tiny.WORDS, 5)) for _ in range(5)]
    prompts.write_text("".join(json.dumps({"turns": [t, "and then?"]}) + "\n" for t in turns))
    out = folder / "bench.json"
    settings = ["--max-prompts", "4", "--max-new-tokens", "10", "--draft-tokens", "3", "--batch", "2"]
    bench(folder, "--prompts", str(prompts), *settings, "--out", str(out))
    found = json.loads(out.read_text())
    assert found["prompts_measured"] == 4 and found["lossless"] is True
    assert found["drafted_tokens"] == 3 * found["drafts"]
    assert found["acceptance_length"] == pytest.approx(1 + found["accepted_tokens"] / found["drafts"], abs=1e-3)
    assert found["acceptance_length"] == pytest.approx(1 + sum(found["acceptance_by_position"]), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "7"], "no checkpoint of step 7"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max-new-tokens", "9999"], "positions"),
        (["--draft-tokens", "0"], "above 0"),
    ],
)
def test_bench_says_what_is_wrong(folder, first, arguments, said):
    done = bench(folder, *arguments, status=2)
    assert said in done.stderr and "Traceback" not in done.stderr
