"""The preview shows each token once, says what is learnt, and escapes what it shows."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from jeagle import flags as configs
from jeagle import preview
from jeagle.config import RunConfig
from jeagle.data import describe_statistics, load_rows, token_texts
from jeagle.errors import UserError
from jeagle.run import dataset
from tests import tiny

NASTY = "<script>alert(1)</script> \x1b[31m & 'naïve' 🙂"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = tiny.flags(folder, data__row_length=96, data__held_out=0.2)
    rows = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    rows[0]["messages"][1]["content"] = NASTY
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
    config = configs.parse_overrides(RunConfig(name="t"), flags, program="t", description="")
    return dataset.prepare(config).data.parent


def shown(run, capsys, *arguments) -> str:
    preview.main([str(run), "--width", "40", *arguments])
    return capsys.readouterr().out


def test_exactly_the_supervised_tokens_are_marked(run, capsys):
    out = shown(run, capsys, "--rows", "1000")
    rows, texts = load_rows(run / "data" / "train"), token_texts(run / "data" / "tokenizer.json")
    wanted = []
    for tokens, segments, _, learnt in zip(*rows, strict=True):
        for segment in range(1, segments.max() + 1):
            here = (segments == segment) & learnt
            edges = np.flatnonzero(np.diff(np.pad(here.astype(int), 1))).reshape(-1, 2)
            wanted += ["".join(text for text, _ in texts(np.asarray(tokens[a:b]))) for a, b in edges]
    found = re.findall("⟦(.*?)⟧", out, re.DOTALL)
    assert found == [text.replace("\x1b", "\\x1b") for text in wanted] and len(found) > 20
    assert out.count("── document") == int(rows.segments_BT.max(axis=1).sum())


def test_control_characters_and_markup_are_escaped(run, capsys, tmp_path):
    assert "\x1b" not in shown(run, capsys, "--rows", "1000") + shown(
        run, capsys, "--rows", "1000", "--part", "held_out"
    )
    shown(run, capsys, "--rows", "1000", "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page
    shown(run, capsys, "--part", "held_out", "--rows", "1000", "--html", str(tmp_path / "held.html"))
    assert "&lt;script&gt;" in re.sub("</?span[^>]*>", "", page + (tmp_path / "held.html").read_text())


def test_the_statistics_are_those_of_the_rows(run, capsys):
    out = shown(run, capsys, "--rows", "0")
    rows = load_rows(run / "data" / "train")
    tokens, learnt = int((rows.segments_BT > 0).sum()), int(rows.supervised_BT.sum())
    assert f"{tokens:,}, of which {learnt / tokens:.1%} are supervised" in out
    assert "61 rows: 1 duplicates, 0 rejected" in out and "0.0% are known to be" in out
    assert "near-duplicates         0, 0 dropped, 0 held out and like" in out


def test_rejected_rows_of_an_older_version_are_shown(run, capsys, tmp_path):
    """Older versions called them set_aside."""
    folder = shutil.copytree(run / "data", tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["statistics"]["rejected"]
    manifest["statistics"]["set_aside"] = {"the line is not valid JSON": 3}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "rejected.jsonl").rename(folder / "set_aside.jsonl")
    assert "1 duplicates, 3 rejected" in shown(tmp_path, capsys, "--rows", "0")
    described = describe_statistics(manifest["statistics"] | manifest["vocabulary"], folder)
    assert any(line.startswith("rejected: 3 x") and "set_aside.jsonl lists" in line for line in described)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--part", "tests"], "--part is train or held_out"), (["--start", "5000"], "there is no row 5000")],
)
def test_rows_that_do_not_exist_are_a_user_error(run, arguments, message):
    with pytest.raises(UserError, match=message):
        preview.main([str(run), *arguments])
    with pytest.raises(UserError, match="no prepared data"):
        preview.main([str(run.parent)])


def test_long_texts_and_characters_of_several_tokens_are_complete(run):
    from tokenizers import Tokenizer

    texts = token_texts(run / "data" / "tokenizer.json")
    text = "🙂 naïve 東京 " * 60
    ids = Tokenizer.from_file(str(run / "data" / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert "".join(piece for piece, _ in texts(np.array(ids))) == text
