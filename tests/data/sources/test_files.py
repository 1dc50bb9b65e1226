"""The same rows come out of any arrangement of JSON and tables, in any packing; what is no JSON is named."""

from __future__ import annotations

import gzip
import json
import zlib

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jeagle.data.sources import json_rows
from jeagle.data.sources.files import records
from jeagle.errors import UserError
from tests.data.helpers import read_conversations

ROWS = [{"prompt": f"p{i} \u2028\x85\x0b", "response": f"r{i}", "note": [i, {"é": "}]"}]} for i in range(7)]
SMALL = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(4)]


def dump(tree, **options) -> str:
    return json.dumps(tree, ensure_ascii=False, **options)


ARRANGEMENTS = {
    "lines": "\n".join(map(dump, ROWS)),
    "lines with blanks and marks": "\n\n\ufeff".join(map(dump, ROWS)),
    "carriage returns": "\r\n".join(map(dump, ROWS)),
    "one line": "".join(map(dump, ROWS)),
    "two on a line": "\n".join(dump(a) + " " + "".join(map(dump, b)) for a, *b in (ROWS[:2], ROWS[2:4], ROWS[4:])),
    "list": dump(ROWS),
    "list over lines": dump(ROWS, indent=1),
    "two lists": dump(ROWS[:3]) + "\n" + dump(ROWS[3:]),
    "two lists over lines": dump(ROWS[:3], indent=2) + dump(ROWS[3:], indent=2),
    "a list, then lines": dump(ROWS[:3]) + "\n" + "\n".join(map(dump, ROWS[3:])),
    "lines, then a list": "\n".join(map(dump, ROWS[:3])) + "\n" + dump(ROWS[3:]),
    "objects over lines": "\n".join(dump(row, indent=4) for row in ROWS),
    "objects over lines, joined": "".join(dump(row, indent=4) for row in ROWS),
}
TABLES = {
    "rows in a field": {"version": "1", "data": SMALL},
    "columns": {name: [row[name] for row in SMALL] for name in SMALL[0]},
    "pandas": {name: {str(i): row[name] for i, row in enumerate(SMALL)} for name in SMALL[0]},
    "pandas, index": {str(i): row for i, row in enumerate(SMALL)},
    "pandas, split": {"columns": [*SMALL[0]], "index": [0, 1, 2, 3], "data": [[*row.values()] for row in SMALL]},
}
PACKINGS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".GZ": lambda data: b"".join(gzip.compress(data[i : i + 40]) for i in range(0, len(data), 40)),
    ".zst": lambda data: b"".join(
        pyarrow.compress(data[i : i + 99], "zstd", asbytes=True) for i in range(0, len(data), 99)
    ),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_json_rows_come_out_of_any_arrangement_and_packing(tmp_path, monkeypatch, arrangement):
    for suffix in (".json", ".jsonl", ".JSON"):
        for ending, pack in PACKINGS.items():
            for mark in ("", "\ufeff"):
                path = tmp_path / f"x{suffix}{ending}"
                path.write_bytes(pack((mark + ARRANGEMENTS[arrangement] + "\n").encode()))
                assert [record.row for record in records(path)] == ROWS, path
    monkeypatch.setattr(json_rows, "CHUNK", 5)
    (tmp_path / "y.json").write_text(ARRANGEMENTS[arrangement], "utf-8")
    assert [record.row for record in records(tmp_path / "y.json")] == ROWS


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_may_hold_a_table(tmp_path, table, indent):
    (tmp_path / "x.json").write_text(dump(TABLES[table], indent=indent))
    assert [record.row for record in records(tmp_path / "x.json")] == SMALL


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{}, {}]},
        {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
        {"data": ["a", "b"]},
    ],
)
def test_a_file_of_one_row_is_no_table(tmp_path, row):
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(dump(row, indent=indent))
        assert [record.row for record in records(tmp_path / "x.json")] == [row]


def test_conversations_may_be_bare_lists(tmp_path):
    chats = [[{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "b"}] for i in range(3)]
    wanted = [{"messages": chat} for chat in chats]
    for name, text in {
        "a.jsonl": "\n".join(map(dump, chats)),
        "b.json": dump(chats),
        "c.json": dump(chats, indent=1),
    }.items():
        (tmp_path / name).write_text(text)
        assert [record.row for record in records(tmp_path / name)] == wanted
    (tmp_path / "d.json").write_text(dump(chats[0], indent=1))
    assert [record.row for record in records(tmp_path / "d.json")] == wanted[:1]


@pytest.mark.parametrize("rubbish", ['{"messages": [{"role": "us', "rubbish", '"', "]", "[{}", "\x00"])
def test_what_follows_a_list_and_is_not_json_is_named_with_its_line(tmp_path, rubbish):
    (tmp_path / "x.json").write_text(dump(ROWS) + "\n" + dump(ROWS[:2]) + "\n" + rubbish)
    with pytest.raises(UserError, match=r"x.json is not valid JSON after its row (9|10), in line 3: correct it there"):
        list(records(tmp_path / "x.json"))


@pytest.mark.parametrize("kind", ["stream", "file", "feather", "parquet"])
def test_tables_of_every_kind_are_read_in_every_packing(tmp_path, kind):
    table = pyarrow.Table.from_pylist([row | {"gone": None} for row in SMALL])
    sink = pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, sink)
    else:
        with (pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file)(sink, table.schema) as out:
            out.write_table(table, max_chunksize=3)
    data = sink.getvalue().to_pybytes()
    suffix = {"stream": ".arrow", "file": ".ARROW"}.get(kind, f".{kind}")
    for ending, pack in PACKINGS.items():
        (tmp_path / f"x{suffix}{ending}").write_bytes(pack(data))
        assert [record.row for record in records(tmp_path / f"x{suffix}{ending}")] == SMALL
        (tmp_path / f"x{suffix}{ending}").write_bytes(pack(data[: len(data) // 2]))
        with pytest.raises(UserError, match="create the file again"):
            list(records(tmp_path / f"x{suffix}{ending}"))


pieces = st.sampled_from(["a", "\u2028", "\x85", "\x0b", "\x1c", "\ud800", "\udc00", "\ud83d\ude00"]) | st.text(
    max_size=4
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.lists(pieces, max_size=3).map("".join), min_size=1, max_size=4))
def test_any_characters_survive_and_half_characters_reject_their_row_alone(tmp_path, texts):
    """Line separators within texts do not split lines; lone surrogates, which no tokenizer takes, cost one row each."""
    rows = [{"prompt": f"p{i}", "response": f"r{i} {text}"} for i, text in enumerate(texts)]
    lines = [json.dumps(row, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in row["response"])) for row in rows]
    (tmp_path / "x.jsonl").write_bytes("\n".join(lines).encode())
    read = read_conversations(str(tmp_path / "x.jsonl"), bad_share=1.0)
    whole = [
        row["response"] for row in map(json.loads, lines) if not any("\ud800" <= c <= "\udfff" for c in row["response"])
    ]
    assert [c.messages[1]["content"] for c in read.conversations] == whole
    assert read.rejected == (
        {"the text is not valid Unicode": len(rows) - len(whole)} if len(whole) < len(rows) else {}
    )


def test_reasons_that_quote_a_row_can_be_printed(tmp_path):
    parts = [{"type": "\ud800\x1b[2J", "text": "a"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}], "\ud800": 1}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        read = read_conversations(str(tmp_path / "x.jsonl"), bad_share=1.0, log=log)
    [reason] = read.rejected
    assert "type \\ud800\\x1b[2J" in reason and reason.isprintable()


def test_nulls_are_as_if_they_were_absent(tmp_path):
    turns = [{"role": None, "from": "human", "content": None, "value": "a", "weight": None}]
    turns += [{"role": None, "from": "gpt", "content": None, "value": "b", "reasoning": None, "tool_calls": None}]
    row = {
        "messages": None,
        "conversations": turns,
        "system": None,
        "tools": None,
        "finish_reason": None,
        "image": None,
    }
    (tmp_path / "x.jsonl").write_text(dump(row))
    [conversation] = read_conversations(str(tmp_path / "x.jsonl")).conversations
    assert [*conversation.messages] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_packed_file_that_is_cut_off_is_named(tmp_path):
    for ending in (".gz", ".zst"):
        data = PACKINGS[ending](ARRANGEMENTS["lines"].encode() * 50)
        (tmp_path / f"x.jsonl{ending}").write_bytes(data[: len(data) // 2] + zlib.compress(b"x"))
        with pytest.raises(UserError, match="x.jsonl"):
            list(records(tmp_path / f"x.jsonl{ending}"))
