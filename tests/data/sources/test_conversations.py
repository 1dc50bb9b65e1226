"""Conversations are read or rejected with their place, and the same prompt is never on both sides of the split."""

from __future__ import annotations

import gzip
import json

import pytest

from jeagle.data import read_prompts
from jeagle.errors import UserError
from tests import tiny
from tests.data.helpers import read_conversations, split_held_out


def test_held_out_prompts_are_never_trained_on(tmp_path):
    found = read_conversations(str(tiny.write_chats(tmp_path / "chats.jsonl", 300))).conversations
    sets = {}
    for share in (0.0, 0.05, 0.2, 0.6):
        training, held_out = split_held_out(found, share)
        assert len(training) + len(held_out) == len(found)
        users = [
            {tuple(m["content"] for m in c.messages if m["role"] == "user") for c in part}
            for part in (training, held_out)
        ]
        assert not users[0] & users[1]
        sets[share] = {c.id for c in held_out}
    assert not sets[0.0] and sets[0.05] < sets[0.2] < sets[0.6]
    assert 0.1 * len(found) < len(sets[0.2]) < 0.3 * len(found)


def test_one_bad_line_is_rejected_and_many_stop_the_reading(tmp_path):
    good = tiny.write_chats(tmp_path / "chats.jsonl", 200).read_text()
    (tmp_path / "one.jsonl").write_text(good + "{not json\n")
    reading = read_conversations(str(tmp_path / "one.jsonl"))
    [(reason, where)] = reading.examples.items()
    assert reason == "the line is not valid JSON" and where.endswith("one.jsonl:201")
    (tmp_path / "many.jsonl").write_text(good + '{"messages": [{"role": "user", "content": "hi"}]}\n' * 9)
    with pytest.raises(UserError, match=r"9 of 209.*has no answer.*many.jsonl:201"):
        read_conversations(str(tmp_path / "many.jsonl"))


def test_sharegpt_lines_are_read_and_duplicates_dropped(tmp_path):
    line = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    (tmp_path / "s.jsonl").write_text(f"{line}\n{line}\n")
    reading = read_conversations(str(tmp_path / "s.jsonl"))
    assert reading.duplicates == 1
    assert reading.conversations[0].messages[1] == {"role": "assistant", "content": "b"}


GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
USER = GOOD["messages"][0]
BAD_LINES = {
    b"{": "not valid JSON",
    b"[" * 100_000: "not valid JSON",
    b'"\xff"': "not valid Unicode",
    b"[[]]": "not a JSON object",
    b'{"messages": "hi"}': "is not valid JSON",
    b'{"messages": 7}': "column messages without a list of turns",
    b'{"talk": []}': "no messages, no conversations",
    json.dumps({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}).encode(): "not valid Unicode",
    json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}).encode(): "empty or is not text",
    json.dumps({"messages": [USER, {"role": "judge", "content": "x"}]}).encode(): "the unknown role 'judge'",
    json.dumps({"conversations": [{"from": "crow", "value": "x"}]}).encode(): "the unknown speaker 'crow'",
    json.dumps(GOOD | {"tools": 7}).encode(): "the tools are not a list",
    json.dumps({"messages": [USER, GOOD["messages"][1] | {"tool_calls": [{}]}]}).encode(): "a tool call has no name",
    json.dumps({"messages": [GOOD["messages"][1]]}).encode(): "an answer without a prompt",
    json.dumps(
        {"messages": [USER | {"content": [{"type": "image_url"}]}, GOOD["messages"][1]]}
    ).encode(): "parts of type image_url",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_rejected_with_its_reason_and_place(tmp_path, line):
    good = tiny.write_chats(tmp_path / "chats.jsonl", 200).read_bytes()
    with gzip.open(tmp_path / "one.jsonl.gz", "wb") as file:
        file.write(line + b"\n" + good)
    reading = read_conversations(str(tmp_path / "one.jsonl.gz"))
    [(reason, where)] = reading.examples.items()
    assert BAD_LINES[line] in reason and where == f"{tmp_path}/one.jsonl.gz:1"
    assert len(reading.conversations) + reading.duplicates == 200


def test_a_file_that_is_cut_off_is_a_user_error(tmp_path):
    whole = gzip.compress(tiny.write_chats(tmp_path / "chats.jsonl", 200).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for source, message in (("cut.jsonl.gz", "cut.jsonl.gz cannot be read"), ("none.jsonl", "no file")):
        with pytest.raises(UserError, match=message):
            read_conversations(str(tmp_path / source))
    with pytest.raises(UserError, match="--data.source is empty"):
        read_conversations("")


@pytest.mark.parametrize("text", ["", "{}\n", '{"turns": []}\n', "[1]\n"])
def test_bad_prompts_are_a_user_error(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match="p.jsonl"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_a_prompts_file_is_any_chat_file_and_what_prepare_tolerates_is_tolerated(tmp_path, capsys):
    turns = [("human", "one"), ("gpt", "theirs"), ("human", "two")]
    rows = [{"turns": [f"{i}", "b"]} for i in range(300)]
    rows += [{"prompt": "alone"}, {"conversations": [{"from": who, "value": text} for who, text in turns]}]
    odd = [json.dumps({"conversations": [{"from": "human", "value": ""}]}), '{"conversations": [{"from": "hum']
    (tmp_path / "p.jsonl").write_text("\n".join([*map(json.dumps, rows), *odd]) + "\n")
    prompts = read_prompts(str(tmp_path / "p.jsonl"), every_turn=True)
    assert [len(p["messages"]) for p in prompts] == [2] * 300 + [1, 3]
    assert "2 of 304 rows have no usable prompt" in capsys.readouterr().out
    assert [len(p["messages"]) for p in read_prompts(str(tmp_path / "p.jsonl"))] == [1] * 302
    assert len({p["id"] for p in prompts}) == 302 and prompts[0]["where"].endswith("p.jsonl:1")
    assert read_prompts(str(tmp_path / "p.jsonl"), every_turn=True, most=5) == prompts[:5]
    (tmp_path / "q.jsonl").write_text("\n".join([*map(json.dumps, rows[:100]), *odd]) + "\n")
    with pytest.raises(UserError, match=r"2 of 102 rows have no usable prompt: .*q.jsonl:101"):
        read_prompts(str(tmp_path / "q.jsonl"))
