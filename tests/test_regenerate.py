"""Answers of the target, as files: what they follow from, and what a changed setting does."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest

from jeagle.data import AnswerFile, read_prompts
from jeagle.data.regeneration.prompts import make_prompt
from jeagle.errors import UserError
from jeagle.run.answers import RegenerateArguments, answer_settings, regenerate, stop_finder
from tests import tiny
from tests.data.helpers import read_conversations

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


def conversations(folder, out: str, **settings) -> dict[str, dict]:
    turns = [[" ".join(tiny.WORDS[i : i + 3 + 9 * (k == 1)]) for k in range(1 + i % 3)] for i in range(6)]
    (folder / "turns.jsonl").write_text("".join(json.dumps({"turns": texts}) + "\n" for texts in turns))
    prompts = read_prompts(str(folder / "turns.jsonl"), every_turn=True)
    rows = regenerate(arguments(folder, out, **settings), prompts)
    asked = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in rows]
    assert sorted(asked) == sorted(turns)
    return {row["id"]: row for row in rows}


def test_every_turn_is_answered_in_one_queue(folder, monkeypatch):
    """Later turns are longer than the first caches, and each answer still follows from its conversation alone."""
    monkeypatch.setattr("jeagle.targets.model.generate.PROMPT_BUCKET", 16)
    together = conversations(folder, "m1.jsonl", batch=4, **SAMPLED)
    for row in together.values():
        replies = [m for m in row["messages"] if m["role"] == "assistant"]
        assert row["sampled_with"].count("/") == 1 and row["finish_reason"] == replies[-1]["finish_reason"]
        assert all(len(m["sampled_ids"]) == 12 or m["finish_reason"] == "stop" for m in replies)
        assert len({tuple(m["sampled_ids"]) for m in replies}) == len(replies)  # turns do not share their randomness
    assert conversations(folder, "m2.jsonl", batch=1, **SAMPLED) == together


def test_a_kill_loses_only_the_conversations_under_way(folder, monkeypatch):
    whole = conversations(folder, "k1.jsonl", batch=2, **SAMPLED)
    appended, real = [], AnswerFile.growing

    @contextlib.contextmanager
    def killed(self):
        with real(self) as append:

            def counted(row):
                append(row)
                appended.append(row["id"])
                if len(appended) == 3:
                    raise KeyboardInterrupt

            yield counted

    monkeypatch.setattr(AnswerFile, "growing", killed)
    with pytest.raises(KeyboardInterrupt):
        conversations(folder, "k2.jsonl", batch=2, **SAMPLED)
    monkeypatch.undo()
    assert len((folder / "k2.jsonl.partial").read_text().splitlines()) == 4
    assert conversations(folder, "k2.jsonl", batch=2, **SAMPLED) == whole


def test_prompts_that_the_target_cannot_read_are_counted_and_the_others_answered(folder, capsys, monkeypatch):
    prompts = [make_prompt([{"role": "user", "content": f"{i} the cat"}]) for i in range(120)]
    long = make_prompt([{"role": "user", "content": "cat " * 600}])
    later = make_prompt([{"role": "user", "content": "one"}, {"role": "user", "content": "cat " * 600}])
    args = dataclasses.replace(arguments(folder, "odd.jsonl"), max_new_tokens=1)
    rows = regenerate(args, [*prompts, long, later])
    assert len(rows) == 121 and long["id"] not in {row["id"] for row in rows}
    printed = capsys.readouterr().out
    assert "refuses 1 of 122 prompts" in printed and "exceed the target's longest sequence" in printed
    [stopped] = [row for row in rows if "stopped" in row]
    assert stopped["id"] == later["id"] and [m["role"] for m in stopped["messages"]] == ["user", "assistant"]
    assert "1 conversations end before their last turn" in printed
    assert regenerate(args, [*prompts, long, later]) == rows  # the refused one is refused again, and is still 1 of 122
    with pytest.raises(UserError, match=r"refuses 1 of 3 prompts.*remove these prompts"):
        regenerate(dataclasses.replace(args, out=folder / "odd2.jsonl"), [*prompts[:2], long])


def test_a_text_without_turns_becomes_ids_of_which_the_answer_is_supervised(folder):
    (folder / "text.jsonl").write_text('{"text": "the cat sat on a mat and saw"}\n')
    [prompt] = read_prompts(str(folder / "text.jsonl"), every_turn=True)
    [row] = regenerate(arguments(folder, "text-out.jsonl"), [prompt])
    [conversation] = read_conversations(str(folder / "text-out.jsonl")).conversations
    [message] = conversation.messages
    assert message["role"] == "ids" and message["ids"] == row["input_ids"] and sum(message["mask"]) <= 12
    assert message["mask"] == [bool(flag) for flag in row["loss_mask"]] and "messages" not in row
    assert regenerate(arguments(folder, "text-out.jsonl"), [prompt]) == [row]


def test_an_unfinished_file_of_the_form_without_turns_is_refused(folder):
    made_from = answer_settings(arguments(folder, "old.jsonl"))
    made_from.pop("rows_form")
    (folder / "old.jsonl.partial").write_text(json.dumps({"made_from": made_from}) + "\n")
    with pytest.raises(UserError, match="begun with other settings .rows_form.: delete it"):
        conversations(folder, "old.jsonl")


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
