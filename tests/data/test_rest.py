"""Conversations, the held-out split, the draft vocabulary, and the order of rows."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from jeagle import align
from jeagle.data import (
    Rendered,
    RowStream,
    choose,
    count_tokens,
    coverage,
    load_tables,
    pack,
    read_conversations,
    read_prompts,
    save_rows,
    save_tables,
    split_held_out,
)
from jeagle.errors import UserError
from tests import tiny


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


def test_one_bad_line_is_set_aside_and_many_stop(tmp_path):
    good = tiny.write_chats(tmp_path / "chats.jsonl", 200).read_text()
    (tmp_path / "one.jsonl").write_text(good + "{not json\n")
    reading = read_conversations(str(tmp_path / "one.jsonl"))
    assert list(reading.aside) == ["no JSON"] and reading.aside["no JSON"][0].endswith("one.jsonl:201")
    (tmp_path / "many.jsonl").write_text(good + '{"messages": [{"role": "user", "content": "hi"}]}\n' * 9)
    with pytest.raises(UserError, match=r"9 of 209.*no answer in it.*many.jsonl:201"):
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
    b"{": "no JSON",
    b"[" * 100_000: "no JSON",
    b'"\xff"': "no Unicode",
    b"[[]]": "no JSON object",
    b'{"messages": "hi"}': "is no JSON",
    b'{"messages": 7}': "column messages without a list of turns",
    b'{"talk": []}': "no messages, conversations",
    json.dumps({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}).encode(): "no Unicode",
    json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}).encode(): "no text",
    json.dumps({"messages": [USER, {"role": "judge", "content": "x"}]}).encode(): "a role 'judge'",
    json.dumps({"conversations": [{"from": "crow", "value": "x"}]}).encode(): "a speaker 'crow'",
    json.dumps(GOOD | {"tools": 7}).encode(): "tools that are no list",
    json.dumps({"messages": [USER, GOOD["messages"][1] | {"tool_calls": [{}]}]}).encode(): "a tool call without a name",
    json.dumps({"messages": [GOOD["messages"][1]]}).encode(): "an answer without a prompt",
    json.dumps({"messages": [USER | {"content": [{"type": "image_url"}]}, GOOD["messages"][1]]}).encode(): "image_url",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_cannot_be_used_whole_is_set_aside_with_its_place(tmp_path, line):
    good = tiny.write_chats(tmp_path / "chats.jsonl", 200).read_bytes()
    with gzip.open(tmp_path / "one.jsonl.gz", "wb") as file:
        file.write(line + b"\n" + good)
    reading = read_conversations(str(tmp_path / "one.jsonl.gz"))
    [(reason, where)] = reading.aside.items()
    assert BAD_LINES[line] in reason and where == [f"{tmp_path}/one.jsonl.gz:1"]
    assert len(reading.conversations) + reading.duplicates == 200


def test_a_file_that_is_cut_off_is_one_sentence(tmp_path):
    whole = gzip.compress(tiny.write_chats(tmp_path / "chats.jsonl", 200).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for source, said in (("cut.jsonl.gz", "cut.jsonl.gz cannot be read"), ("none.jsonl", "no file")):
        with pytest.raises(UserError, match=said):
            read_conversations(str(tmp_path / source))
    with pytest.raises(UserError, match="--data.source is empty"):
        read_conversations("")


@pytest.mark.parametrize("text", ["", "{}\n", '{"turns": []}\n', "[1]\n"])
def test_bad_prompts_are_one_sentence(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match="p.jsonl"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_vocabulary_is_the_most_frequent_with_ends_forced_in():
    counts = np.array([5, 0, 9, 9, 1, 7])
    np.testing.assert_array_equal(choose(counts, 3, [1]), [1, 2, 3])  # ties go to the lower id
    np.testing.assert_array_equal(choose(counts, 0, [1]), np.arange(6))
    assert coverage(counts, np.array([2, 3])) == pytest.approx(18 / 31)
    with pytest.raises(UserError, match="no room"):
        choose(counts, 1, [1, 4])


def test_tables_are_offsets_and_checked(tmp_path):
    ids = np.array([1, 2, 5])
    save_tables(tmp_path / "t", np.ones(8, np.int64), ids, {"data": "x"})
    np.testing.assert_array_equal(np.load(tmp_path / "t" / "d2t.npy"), [1, 1, 3])
    np.testing.assert_array_equal(load_tables(tmp_path / "t", {"data": "x"}), ids)
    with pytest.raises(UserError, match="data differ"):
        load_tables(tmp_path / "t", {"data": "y"})
    np.save(tmp_path / "t" / "d2t.npy", ids)  # ids where offsets belong
    with pytest.raises(UserError, match="offsets"):
        load_tables(tmp_path / "t")


def test_a_tokenizer_of_another_target_is_refused():
    rows = pack([Rendered(np.array([3, 9], np.int32), np.array([False, True]))], 4).rows
    assert count_tokens(rows, 10)[9] == 1
    with pytest.raises(UserError, match="id 9.*vocabulary has 9"):
        count_tokens(rows, 9)
    with pytest.raises(UserError, match="end token 12"):
        choose(np.arange(10), 4, [12])


def test_tables_that_were_cut_off_are_one_sentence(tmp_path):
    save_tables(tmp_path / "t", np.ones(8, np.int64), np.array([1, 2, 5]), {})
    (tmp_path / "t" / "d2t.npy").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_tables(tmp_path / "t")


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    documents = [Rendered(np.full(9, i + 1, np.int32), rng.random(9) < 0.6) for i in range(23)]
    save_rows(pack(documents, 10).rows, tmp_path / "rows")
    return tmp_path / "rows"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_order_does_not_depend_on_processes_or_on_where_one_resumes(rows, processes):
    alone = RowStream(rows, 4, seed=5)
    parts = [RowStream(rows, 4, seed=5, process_index=i, process_count=processes) for i in range(processes)]
    for step in range(14):  # over epoch ends
        wanted = alone.batch(step).tokens_BT
        np.testing.assert_array_equal(np.concatenate([p.batch(step).tokens_BT for p in parts]), wanted)
    for part in parts:
        part.count_live(3, "served", cross_documents=False)
    assert [parts[0].widest(step) for step in range(3, 9)] == [parts[-1].widest(step) for step in range(3, 9)]


def test_the_order_follows_from_the_seed_and_the_epoch_alone(rows):
    """One order, cut into batches of any size; another for each seed and each epoch."""
    one = RowStream(rows, 1, seed=5)
    flat = np.concatenate([one.row_numbers(step) for step in range(2 * 23)])
    for size in (2, 4, 23):
        stream = RowStream(rows, size, seed=5)
        cut = np.concatenate([stream.row_numbers(step) for step in range(2 * 23 // size)])
        np.testing.assert_array_equal(cut, flat[: len(cut)])
    other = RowStream(rows, 1, seed=6)
    assert [int(other.row_numbers(step)[0]) for step in range(23)] != flat[:23].tolist() != flat[23:].tolist()


def test_every_epoch_holds_every_row_in_another_order(rows):
    stream = RowStream(rows, 1, seed=5)
    epochs = [[int(stream.row_numbers(e * 23 + i)[0]) for i in range(23)] for e in range(3)]
    assert all(sorted(e) == list(range(23)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_widest_is_what_the_program_needs(rows):
    stream = RowStream(rows, 4, seed=1)
    stream.count_live(3, "predicted", cross_documents=False)
    for step in range(5):
        batch = stream.batch(step)
        counts = align.counting_slots(batch, 3, "predicted", xp=np)
        reads = align.read_positions(batch.segments_BT, 3, xp=np)
        taught = align.teacher_positions(counts, reads, xp=np).sum(1)
        assert stream.widest(step) == max(counts.any(0).sum(1).max(), taught.max())


def test_rows_that_do_not_divide_are_refused(rows):
    with pytest.raises(UserError, match="does not divide"):
        RowStream(rows, 3, seed=0, process_count=2)
