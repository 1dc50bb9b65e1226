"""Answers of the target, as files: what they follow from, and what a changed setting does."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jeagle.data import read_prompts
from jeagle.errors import UserError
from jeagle.run.answers import RegenerateArguments, regenerate, stop_finder
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regenerate")
    tiny.write_target(folder / "target")
    lines = [json.dumps({"turns": [" ".join(tiny.WORDS[i : i + 4])]}) for i in range(7)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder, out: str, **settings) -> RegenerateArguments:
    return RegenerateArguments(str(folder / "target"), folder / out, max_new_tokens=12, dtype="float32", **settings)


def answers(folder, out: str, prompts=slice(None), **settings) -> dict[str, str]:
    found = read_prompts(str(folder / "prompts.jsonl"))[prompts]
    rows = regenerate(arguments(folder, out, **settings), found)
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)
    return {row["id"]: row["messages"][-1]["content"] for row in rows}


def test_an_answer_follows_from_its_prompt_and_the_seed(folder):
    all_of_them = answers(folder, "a.jsonl", batch=2, **SAMPLED)
    some = answers(folder, "b.jsonl", slice(5, 1, -1), batch=16, **SAMPLED)
    assert len(some) == 4 and some.items() <= all_of_them.items()
    assert answers(folder, "c.jsonl", **SAMPLED | {"seed": 4}) != all_of_them
    assert answers(folder, "d.jsonl") != all_of_them


def test_finished_answers_are_kept_until_a_setting_changes(folder, capsys):
    first = answers(folder, "kept.jsonl.gz", slice(0, 3), **SAMPLED)
    note = json.loads((folder / "kept.jsonl.gz.made_from.json").read_text())
    assert note.items() >= SAMPLED.items() and note["max_new_tokens"] == 12
    more = answers(folder, "kept.jsonl.gz", **SAMPLED)
    assert len(more) == 7 and first.items() <= more.items() and "changed" not in capsys.readouterr().out
    other = answers(folder, "kept.jsonl.gz", **SAMPLED | {"temperature": 0.7})
    assert "temperature changed since" in capsys.readouterr().out and other != more
    greedy = answers(folder, "kept.jsonl.gz")
    assert "seed, temperature, top_k, top_p changed" in capsys.readouterr().out
    assert answers(folder, "kept.jsonl.gz", seed=9) == greedy  # greedy answers know no seed
    assert "changed" not in capsys.readouterr().out


def test_an_unfinished_file_of_other_settings_is_refused_by_name(folder):
    args = arguments(folder, "partial.jsonl", **SAMPLED)
    prompts = read_prompts(str(folder / "prompts.jsonl"))
    whole = regenerate(args, prompts)
    header = {"made_from": json.loads((folder / "partial.jsonl.made_from.json").read_text())}
    lines = [json.dumps(tree) for tree in (header, whole[0])]
    (folder / "partial.jsonl").unlink()
    (folder / "partial.jsonl.partial").write_text("\n".join(lines) + '\n{"id": "cut o')
    with pytest.raises(UserError, match=r"partial was begun with other settings \(seed, top_k\): delete it"):
        regenerate(dataclasses.replace(args, seed=4, top_k=7), prompts)
    assert regenerate(args, prompts) == whole
    assert not (folder / "partial.jsonl.partial").exists()


def test_stop_texts_end_an_answer_and_are_removed(folder):
    free = answers(folder, "free.jsonl")
    prompt, text = max(free.items(), key=lambda item: len(item[1]))
    stop = text[4:7]
    cut = answers(folder, "stopped.jsonl", stop=(stop,))
    assert cut[prompt] == text[: text.find(stop)]
    assert all(cut[i] == free[i].partition(stop)[0] for i in free)


def test_the_first_token_that_completes_a_stop_text_is_found():
    class Letters:
        def decode(self, tokens):
            return "".join(chr(t) for t in tokens)

    stops = stop_finder(Letters(), ["cd", "x"])
    assert [stops([ord(c) for c in text]) for text in ("abc", "abcd", "abcdex", "axcd", "")] == [None, 4, 4, 2, None]


@pytest.mark.parametrize(("settings", "message"), [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p")])
def test_invalid_settings_are_refused(folder, settings, message):
    with pytest.raises(UserError, match=message):
        answers(folder, "wrong.jsonl", **settings)
