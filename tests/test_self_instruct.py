"""No data at all: the target writes the prompts too, the same ones however it is asked, none like another."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json

import pytest
from safetensors.numpy import load_file, save_file

from jeagle import targets
from jeagle.data import collect_prompts, prompt_requests
from jeagle.errors import UserError
from jeagle.run.answers import RegenerateArguments, regenerate, self_instructed, target_loader
from tests import tiny
from tests.data.helpers import read_conversations
from tests.data.regeneration.test_openai_client import Fake

pytestmark = pytest.mark.usefixtures("one_device")
ASKED = "People sent these messages"


def write(text: str) -> str:
    """A stand-in for a target: a prompt that follows from the request. Every fifth is always the same one."""
    if not text.startswith(ASKED):
        return f"answer to {text}"
    digest = hashlib.sha256(text.encode()).digest()
    if digest[0] % 5 == 0:
        return f"Tell me about the old mill by the river, and when it was built{'?' * (digest[1] % 3)}"
    return "<think>hm</think>" * (digest[2] % 2) + '"' + " ".join(f"w{b}" for b in digest) + '"'


def arguments(folder, url: str, **settings) -> RegenerateArguments:
    return RegenerateArguments(
        "m", folder / "out.jsonl", server=url, **{"self_instruct": 60, "concurrency": 8} | settings
    )


def run(args: RegenerateArguments) -> list[dict]:
    return regenerate(args, self_instructed(args))


def test_every_prompt_is_different_and_is_answered_once(tmp_path, capsys):
    with Fake(say=write) as fake:
        rows = run(arguments(tmp_path, fake.url))
    prompts = [row["messages"][0]["content"] for row in rows]
    assert len(set(prompts)) == 60 and sum("old mill" in p for p in prompts) == 1
    assert not any("think" in p or p.startswith('"') for p in prompts)
    assert all(row["messages"][1]["content"] == f"answer to {p}" for row, p in zip(rows, prompts, strict=True))
    assert max(fake.asked.values()) == 1
    metrics = json.loads((tmp_path / "out.jsonl.variety.json").read_text())
    assert metrics["kept"] == 60 and metrics["near_duplicates"] + metrics["repeated"] >= 8
    assert "60 prompts written; dropped:" in capsys.readouterr().out and metrics["nearest_mean"] < 0.5
    assert len(read_conversations(str(tmp_path / "out.jsonl")).conversations) == 60


def test_the_prompts_do_not_depend_on_concurrency_or_interruptions(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Fake(say=write) as fake:
        whole = run(arguments(tmp_path / "a", fake.url, concurrency=1))
    left = {}

    def dies(text, attempt):
        kind = "requests" if text.startswith(ASKED) else "answers"
        left[kind] -= 1
        return "drop" if left[kind] < 0 else None

    asked = collections.Counter()
    for _ in range(12):
        left.update(requests=50, answers=20)
        with Fake(dies, say=write) as fake:
            args = arguments(tmp_path / "b", fake.url)
            try:
                found = _impatient(args)
            except UserError:
                found = None
        asked.update(dict.fromkeys(fake.asked, 1))
        if found is not None:
            break
    assert found == whole
    assert len(asked) == len({row["id"] for row in whole}) + len(_turn_rows(tmp_path / "b"))


def _turn_rows(folder) -> list[str]:
    return (folder / "out.jsonl.turns.jsonl").read_text().splitlines()


def _impatient(args: RegenerateArguments) -> list[dict]:
    """`run`, but a prompt is given up at once."""
    from jeagle.data import AnswerServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jeagle.data.AnswerServer", lambda *a, **k: dataclasses.replace(AnswerServer(*a, **k), retries=0))
        return run(args)


def test_a_larger_number_adds_to_the_first_prompts(tmp_path):
    with Fake(say=write) as fake:
        first = run(arguments(tmp_path, fake.url, self_instruct=20))
    with Fake(say=write) as fake:
        more = run(arguments(tmp_path, fake.url, self_instruct=50))
    assert {row["id"] for row in first} < {row["id"] for row in more} and len(more) == 50
    assert not any(text in {row["messages"][0]["content"] for row in first} for text in fake.asked)
    assert prompt_requests(40, 3)[:20] == prompt_requests(20, 3)
    assert prompt_requests(20, 3)[0]["messages"] != prompt_requests(20, 4)[0]["messages"]


def test_a_target_that_repeats_itself_gives_a_warning_and_an_empty_one_an_error(tmp_path, capsys):
    with Fake(say=lambda text: "What is the time in Lima?") as fake:
        assert len(run(arguments(tmp_path, fake.url, self_instruct=5))) == 1
    assert "repeats itself: 1 of 5 prompts" in capsys.readouterr().out
    with (
        Fake(say=lambda text: '""') as fake,
        pytest.raises(UserError, match="no usable prompt in 84 attempts .84 empty"),
    ):
        run(arguments(tmp_path, fake.url, self_instruct=5, seed=1))


def test_prompts_that_were_cut_off_or_shown_are_not_used():
    shown = prompt_requests(1, 0)[0]["messages"][0]["content"].split("\n- ")[1].split("\n")[0]
    said = [("What is a comet made of, and where does it come from?", "length"), (shown, "stop"), ("x" * 5000, "stop")]
    rows = [
        {"messages": [{"role": "assistant", "content": text}], "finish_reason": why, "category": "stem"}
        for text, why in said
    ]
    turns = collect_prompts(rows, 9)
    assert (turns.prompts, turns.unusable, turns.repeated) == ([], 2, 1)


def test_a_target_writes_its_own_prompts_and_is_loaded_once(tmp_path, monkeypatch):
    tiny.write_target(tmp_path / "target", max_position_embeddings=2048)
    weights = load_file(tmp_path / "target" / "model.safetensors")
    weights["lm_head.weight"][2:] *= 0.3  # so that it says its end token now and then
    save_file(weights, tmp_path / "target" / "model.safetensors")
    args = RegenerateArguments(
        str(tmp_path / "target"), tmp_path / "out.jsonl", dtype="float32", self_instruct=3, turn_tokens=24, batch=16
    )
    loads, real = [], targets.load_target
    monkeypatch.setattr(targets, "load_target", lambda *a, **k: (loads.append(1), real(*a, **k))[1])

    def both(args):
        opened = target_loader(args)
        return regenerate(args, self_instructed(args, opened), opened)

    whole = both(dataclasses.replace(args, max_new_tokens=8))
    assert len(whole) == 3 and len(loads) == 1 and len({row["messages"][0]["content"] for row in whole}) == 3
    turns = _turn_rows(tmp_path)
    note = json.loads((tmp_path / "out.jsonl.turns.jsonl.made_from.json").read_text())
    assert (note["temperature"], note["max_new_tokens"]) == (1.0, 24)
    # As a kill leaves it: some turns in an unfinished file, the last line cut off.
    (tmp_path / "out.jsonl.turns.jsonl").unlink()
    (tmp_path / "out.jsonl").unlink()
    lines = [json.dumps({"made_from": note}), *turns[:-2], turns[-2][:30]]
    (tmp_path / "out.jsonl.turns.jsonl.partial").write_text("\n".join(lines))
    again = both(dataclasses.replace(args, max_new_tokens=8, batch=4))
    assert again == whole and _turn_rows(tmp_path) == turns
