"""Any chat data, from any place: found, named, mixed, and never read in part."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jeagle.data import parse_source, read_prompts, source_fingerprint
from jeagle.data.sources import json_rows
from jeagle.data.sources.catalog import NAMED_DATASETS
from jeagle.data.sources.files import records
from jeagle.errors import UserError
from tests import tiny
from tests.data.helpers import read_conversations
from tests.data.sources.dataset_rows import ANSWER, CHAT, QUESTION, ROWS, SHAPES


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the form and the packing that the file's name says."""
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    data = json.dumps(rows, indent=1, ensure_ascii=False).encode() if kind == "json" else lines(rows)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pyarrow.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", NAMED_DATASETS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_named_dataset_is_read_from_local_files(tmp_path, name, suffix):
    path = write(tmp_path / f"rows.{suffix}", [ROWS[name]])
    [conversation] = read_conversations(f"{name}:{path}").conversations
    said = [m for m in conversation.messages if m["role"] != "system"]
    assert [m["role"] for m in said] == ["user", "assistant"]
    assert said[0]["content"] == QUESTION and said[1]["content"].endswith(ANSWER)
    assert conversation.where.startswith(f"{path}:") and conversation.model == ROWS[name].get("generator", "")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "jsonl.gz", "jsonl.zst", "json.gz", "json.zst"])
def test_columns_are_recognised_in_every_file_format(tmp_path, shape, suffix):
    path = write(tmp_path / f"x.{suffix}", [SHAPES[shape]])
    reading = read_conversations(str(path))
    assert [f"{columns}" for _, columns in reading.columns] == [shape]
    said = [m["content"] for m in reading.conversations[0].messages]
    assert said == {"column text": ["the cat sat on a mat"]}.get(shape) or said[-1] == ANSWER


def test_a_long_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 7)  # every boundary falls somewhere
    rows = [{"messages": CHAT, "n": [i, {"é": "}]"}]} for i in range(50)]
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(json.dumps(rows, indent=indent))
        assert [r.row for r in records(tmp_path / "x.json")] == rows


def test_a_json_file_may_be_one_line_and_begin_with_a_byte_order_mark(tmp_path):
    rows = [{"messages": CHAT}, {"messages": CHAT, "n": 1}]
    for name, tree in {"list": rows, "wrapped": {"data": rows}, "indented": {"data": rows}}.items():
        text = json.dumps(tree, indent=1 if name == "indented" else None)
        for mark in ("", "\ufeff"):
            (tmp_path / "x.json").write_text(mark + text + "\n\n", "utf-8")
            assert [r.row for r in records(tmp_path / "x.json")] == rows, (name, mark)
    (tmp_path / "x.json").write_text("\n" + json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]) + "\n{\n")
    assert [r.where.rpartition(":")[2] for r in records(tmp_path / "x.json")] == ["2", "4", "5"]
    (tmp_path / "x.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert [r.row for r in records(tmp_path / "x.jsonl")] == rows


def test_other_encodings_and_formats_are_refused(tmp_path):
    """Read line by line, the second line of this UTF-16 would otherwise be read as other characters."""
    rows = [{"messages": [{"role": "user", "content": "中文"}, {"role": "assistant", "content": "中"}]}] * 3
    (tmp_path / "x.jsonl").write_bytes(lines(rows).decode().encode("utf-16"))
    assert all(record.reason for record in records(tmp_path / "x.jsonl"))
    (tmp_path / "x.csv").write_text("prompt,response\na,b\n")
    with pytest.raises(UserError, match="x.csv is not a .jsonl.*first line is not JSON"):
        list(records(tmp_path / "x.csv"))
    (tmp_path / "chats").write_bytes(lines(rows))
    assert [record.row for record in records(tmp_path / "chats")] == rows


@pytest.mark.parametrize("text", ["[{}", "[{},", "[{} {}", '[{"a": ]', "", "[", "nul", '{"a": 1', "[1, 2"])
def test_json_that_is_cut_off_is_a_user_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError):
        read_conversations(str(tmp_path / "x.json"))


def test_folders_and_globs_are_read_in_order_of_names(tmp_path):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / ".hidden.jsonl").write_text("no")
    (tmp_path / "d" / "notes.txt").write_text("no")
    for i, name in enumerate(("b.jsonl", "a.parquet", "e/c.json.gz")):
        write(tmp_path / "d" / name, [{"prompt": f"p{i}", "response": "x"}])
    for source in (tmp_path / "d", f"{tmp_path}/d/**/[abc].*"):
        found = [c.messages[0]["content"] for c in read_conversations(str(source)).conversations]
        assert found == ["p1", "p0", "p2"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no"):
        read_conversations(str(tmp_path / "empty"))


def test_a_folder_of_the_datasets_library_is_read_without_its_metadata(tmp_path):
    import datasets

    made = datasets.Dataset.from_list([{"prompt": "p", "response": "x", "kept": None}])
    made.save_to_disk(str(tmp_path / "saved"))
    assert read_conversations(str(tmp_path / "saved")).conversations[0].messages[0]["content"] == "p"


def test_weights_are_observed_until_a_part_is_exhausted(tmp_path):
    for name, count in (("a", 300), ("b", 50)):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "response": "x"} for i in range(count)])
    reading = read_conversations(f"0.75*{tmp_path}/a.jsonl, 0.25*{tmp_path}/b.jsonl")
    first = [c.messages[0]["content"][0] for c in reading.conversations]
    assert first.count("b") == 50 and abs(first.count("a") - 150) <= 3
    for end in range(4, len(first), 4):
        assert abs(first[:end].count("b") - end / 4) <= 1
    [note] = reading.notes
    assert "b.jsonl is exhausted after 50" in note
    without = read_conversations(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")
    assert len(without.conversations) == 350 and not without.notes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "--data.source is empty"),
        ("ultrchat", "did you mean ultrachat"),
        ("no/such/file.jsonl", "no file no/such/file.jsonl"),
        ("0.5*starter,gsm8k", "weights to some parts"),
        ("0*starter", "weight of starter"),
        (",", "names no data"),
        ("gsm8k:none.jsonl", "no file none.jsonl"),
    ],
)
def test_a_wrong_source_is_a_user_error(source, message):
    with pytest.raises(UserError, match=message):
        parse_source(source)


def test_the_fingerprint_depends_on_the_bytes_and_the_weights(tmp_path):
    a, b = (write(tmp_path / f"{n}.jsonl", [{"prompt": n, "response": "x"}]) for n in "ab")
    found = {source_fingerprint(parse_source(s)) for s in (f"{a}", f"{b}", f"{a},{b}", f"1*{a},2*{b}", f"1*{a},3*{b}")}
    assert len(found) == 5
    before = source_fingerprint(parse_source(str(a)))
    write(a, [{"prompt": "c", "response": "x"}])
    assert source_fingerprint(parse_source(str(a))) != before


def test_answers_before_the_first_prompt_are_removed_and_counted(tmp_path):
    talk = [{"from": "gpt", "value": "so"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    reading = read_conversations(str(write(tmp_path / "x.jsonl", [{"conversations": talk}])))
    assert [m["content"] for m in reading.conversations[0].messages] == ["a", "b"]
    assert list(reading.notes.values()) == [1]


def test_tool_chats_of_both_forms_are_read_alike(tmp_path):
    call = {"name": "f", "arguments": {"x": 1, "y": None}}
    result = {"role": "tool", "content": "7", "name": "f"}
    forms = [
        [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}, result, CHAT[1]],
        [
            CHAT[0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": call | {"arguments": json.dumps(call["arguments"])}}],
            },
            result,
            CHAT[1],
        ],
        [
            {"from": "human", "value": QUESTION},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "7", "name": "f"},
            {"from": "gpt", "value": ANSWER},
        ],
    ]
    path = write(tmp_path / "x.jsonl", [{"messages": form, "tools": json.dumps([{"name": "f"}])} for form in forms])
    reading = read_conversations(str(path))
    assert reading.duplicates == 2 and reading.conversations[0].tools == ({"name": "f"},)
    [calling] = [m for m in reading.conversations[0].messages if "tool_calls" in m]
    assert calling["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}


def test_prompts_of_any_rows_are_read(tmp_path):
    path = write(tmp_path / "p.parquet", [{"question": QUESTION, "answer": ANSWER}])
    assert read_prompts(str(path))[0]["messages"] == [CHAT[0]]
    path = write(tmp_path / "t.jsonl", [{"text": "one two three four"}])
    assert read_prompts(str(path))[0]["messages"] == [{"role": "text", "content": "one two"}]


def test_reading_stops_early_if_no_row_can_be_used(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n" * 5000)
    with pytest.raises(UserError, match="1000 of 1000"):
        read_conversations(str(tmp_path / "x.jsonl"))


def test_reading_keeps_the_order_of_the_file(tmp_path):
    path = tiny.write_chats(tmp_path / "chats.jsonl", 40)
    where = [int(c.where.rpartition(":")[2]) for c in read_conversations(str(path)).conversations]
    assert where == sorted(where) and np.all(np.diff(where) >= 1)


@pytest.mark.parametrize("name", NAMED_DATASETS)
def test_each_named_dataset_is_read_from_the_hub(tmp_path, monkeypatch, name):
    """The real library, on a local copy in place of the hub, streamed and not."""
    import datasets

    real, asked = datasets.load_dataset, []

    def load(hub, config, *, split, streaming):
        asked.append((hub, config, split))
        return real("parquet", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path / "c"))

    path = write(tmp_path / "rows.parquet", [ROWS[name]] * 2)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = []
    for streaming in (False, True):
        reading = read_conversations(name, streaming=streaming)
        found.append(reading.conversations)
        known = NAMED_DATASETS[name]
        assert asked[: len(known.splits)] == [(known.hub, known.config, split) for split in known.splits]
        assert reading.rows == 2 * len(known.splits) and len(found[-1]) == 1
    assert found[0] == found[1]


def test_a_dataset_that_cannot_be_loaded_is_a_user_error(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    part = parse_source("owner/name:config#test")[0]
    assert (part.hub, part.config, part.splits) == ("owner/name", "config", ("test",))
    with pytest.raises(UserError, match="owner/name cannot be loaded .no route."):
        list(part.rows(streaming=False))
