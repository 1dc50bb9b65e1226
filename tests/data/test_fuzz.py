"""Malformed inputs: one sentence or finished rows, never a traceback and never half of anything."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jeagle import data
from jeagle import flags as configs
from jeagle.config import DataConfig
from jeagle.data import parse_source, prepare_rows, read_prompts
from jeagle.errors import UserError
from jeagle.run import dataset
from jeagle.runtime.manifest import atomic_folder, write_manifest
from tests import tiny
from tests.data.chats import CHATS, TOOL, TOOL_CHAT, end_ids, tokenizer_for
from tests.data.helpers import read_conversations
from tests.data.sources.dataset_rows import ROWS, SHAPES

SUFFIXES = ("jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "parquet")
GOOD = [*SHAPES.values(), *ROWS.values(), *({"messages": m} for m in CHATS.values())]
GOOD.append({"messages": TOOL_CHAT, "tools": [TOOL]})
ODD = [
    None,
    True,
    -1,
    1e308,
    "",
    " ",
    "\x00",
    "é\ud800",
    [],
    {},
    [[]],
    [None],
    {"role": None},
    "<|im_end|>",
    "a" * 5000,
]


def spoil(tree, random_: random.Random):
    """One random place of a tree, replaced, removed or doubled."""
    if isinstance(tree, dict) and tree and random_.random() < 0.8:
        name = random_.choice(list(tree))
        changed = dict(tree)
        if random_.random() < 0.15:
            del changed[name]
        else:
            changed[name] = spoil(tree[name], random_)
        return changed
    if isinstance(tree, list) and tree and random_.random() < 0.8:
        place = random_.randrange(len(tree))
        return [*tree[:place], spoil(tree[place], random_), *tree[place + random_.randrange(2) :]]
    return random_.choice(ODD)


def malformed(suffix: str, random_: random.Random) -> bytes:
    """A file with a few spoilt rows, and often spoilt bytes."""
    rows = [spoil(row, random_) if random_.random() < 0.5 else row for row in random_.choices(GOOD, k=8)]
    if suffix == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([random_.choice(GOOD[:6])] * 3), sink)
        data = sink.getvalue().to_pybytes()
    elif suffix.startswith("jsonl"):
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    else:
        data = json.dumps(random_.choice([rows, {"data": rows}, rows[0]])).encode()
    if random_.random() < 0.4:
        data = spoil_bytes(data, random_)
    data = gzip.compress(data) if suffix.endswith("gz") else data
    data = pyarrow.compress(data, "zstd", asbytes=True) if suffix.endswith("zst") else data
    return spoil_bytes(data, random_) if random_.random() < 0.3 or suffix == "parquet" else data


def spoil_bytes(data: bytes, random_: random.Random) -> bytes:
    place = random_.randrange(len(data)) if data else 0
    how = random_.randrange(4)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + bytes([random_.randrange(256)]) + data[place + 1 :]
    if how == 2:
        return data[:place] + random_.randbytes(random_.randrange(1, 40)) + data[place:]
    return random_.randbytes(random_.randrange(60))


def prepare_in(out: Path, source: str, tokenizer, config: DataConfig) -> str:
    """What is said where it is refused; nothing where rows were made."""
    try:
        with atomic_folder(out, data.ROWS) as aside:
            ends, vocab = end_ids(tokenizer), len(tokenizer)
            statistics = prepare_rows(parse_source(source), tokenizer, config, aside, end_token_ids=ends, vocab=vocab)
            write_manifest(aside, {"made_from": {}, "statistics": statistics})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_thousand_malformed_files(tmp_path, suffix):
    """167 of each kind: read, rendered, packed and written, or refused with a sentence and nothing left behind."""
    random_, tokenizer = random.Random(suffix), tokenizer_for("chatml")
    path, out = tmp_path / f"x.{suffix}", tmp_path / "data"
    outcomes = {"finished": 0, "refused": 0}
    for number in range(1000 // len(SUFFIXES) + 1):
        path.write_bytes(malformed(suffix, random_))
        config = DataConfig(row_length=256, held_out=0.0, bad_share=random_.choice([0.01, 1.0]))
        said = prepare_in(out, str(path), tokenizer, config)
        assert "\n" not in said, number
        outcomes["refused" if said else "finished"] += 1
        for read in (read_conversations, read_prompts):
            with contextlib.suppress(UserError):
                read(str(path))
        assert {p.name for p in tmp_path.iterdir()} <= {"data", path.name}, number
    assert min(outcomes.values()) > 5, outcomes


def test_a_malformed_file_does_not_change_finished_data(tmp_path):
    flags = tiny.flags(tmp_path)
    base = configs.RunConfig(name="t")
    data = dataset.prepare(configs.parse_overrides(base, flags, program="t", description="")).data
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    random_ = random.Random(0)
    for _ in range(5):
        (tmp_path / "bad.jsonl").write_bytes(random_.randbytes(200))
        config = configs.parse_overrides(
            base, [*flags, "--data.source", str(tmp_path / "bad.jsonl")], program="t", description=""
        )
        with pytest.raises(UserError):
            dataset.prepare(config)
        assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before
