"""The check of chat templates teaches what is sampled for the shapes of published ones, and its oracle sees faults."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jeagle import preview
from jeagle.config import DataConfig
from jeagle.data import check_template
from jeagle.data.chat.render import Rendered, Renderer
from jeagle.data.chat.template_check import CHATS, judge
from jeagle.data.chat.templates import TEMPLATES, ConversationError
from jeagle.errors import UserError
from tests.data.chat.shapes import SHAPES, named, tokenizer_of
from tests.data.chats import SPECIAL


@pytest.mark.parametrize("name", SHAPES)
def test_a_template_of_each_shape_teaches_what_is_sampled_or_says_why_not(name):
    shape = SHAPES[name]
    outcomes = check_template(*tokenizer_of(shape))
    assert {kind: outcome for kind, outcome in outcomes.items() if outcome.verdict == "WRONG"} == {}
    assert {kind for kind, outcome in outcomes.items() if outcome.verdict == "refused"} == shape.refuses


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_named_templates_teach_what_is_sampled_or_say_why_not(name):
    outcomes = check_template(*named(name, (SPECIAL[name][0], *SPECIAL[name][2])[:1]))
    assert {kind: outcome for kind, outcome in outcomes.items() if outcome.verdict == "WRONG"} == {}
    assert {"one turn", "several turns", "cut", "not learnt", "odd text"} <= {
        kind for kind, outcome in outcomes.items() if outcome.verdict == "right"
    }


def _tool_result(tokenizer, document):
    """The place of the tool's result in a document."""
    text = [tokenizer.decode([i]) for i in document.ids.tolist()]
    starts = np.cumsum([0, *map(len, text)])
    return np.searchsorted(starts, "".join(text).index("zzresult1"))


def _shifted(tokenizer, document):
    document.supervised[1:] = document.supervised[:-1].copy()


def _with_result(tokenizer, document):
    place = _tool_result(tokenizer, document)
    document.supervised[place : document.supervised.argmax()] = True


def _result_beside(tokenizer, document):
    place = _tool_result(tokenizer, document)
    document.supervised[place : place + 9] = True


def _without_end(tokenizer, document):
    document.supervised[np.flatnonzero(document.supervised)[-1]] = False


def _without_last_turn(tokenizer, document):
    last = np.flatnonzero(np.diff(np.pad(document.supervised.astype(int), 1)))[-2]
    document.supervised[last:] = False


def _with_prompt(tokenizer, document):
    document.supervised[document.supervised.argmax() - 1] = True


FAULTS = {
    _shifted: "not the prompt",
    _with_result: "not the prompt",
    _result_beside: "spans are learnt",
    _without_end: "the end is not learnt",
    _without_last_turn: "spans are learnt",
    _with_prompt: "not the prompt",
}


def _judged(name, kind, fault=None):
    tokenizer, ends = tokenizer_of(SHAPES[name])
    [documents] = Renderer(tokenizer, DataConfig(), ends)([CHATS[kind]])
    if fault is not None:
        fault(tokenizer, documents[-1])
    return judge(tokenizer, ends, CHATS[kind], documents)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_oracle_sees_a_mask_that_is_wrong(fault):
    assert _judged("history drops thoughts", "call").verdict == "right"
    outcome = _judged("history drops thoughts", "call", fault)
    assert outcome.verdict == "WRONG" and FAULTS[fault] in outcome.reason


ANSWER, THOUGHT = "zzanswer1 boats sail at dawn zzanswerend1", "zzthought1 boats sail at dawn zzthoughtend1"


@pytest.mark.parametrize(
    ("kind", "learnt", "reason"),
    [
        ("one turn", f"{ANSWER}<|im_end|>", ""),
        ("one turn", f"<think>\n\n</think>\n\n{ANSWER}<|im_end|>", "an empty block"),
        ("one turn", f"{ANSWER}", "the end is not learnt"),
        ("one turn", f"{ANSWER[:-3]}<|im_end|>", "in place of"),
        ("one turn", f"{ANSWER}<|im_end|>\n", "follows the end"),
        ("one turn", f"{ANSWER} and more<|im_end|>", "does not write"),
        ("reasoning", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>", ""),
        ("reasoning", f"{ANSWER}<|im_end|>", "in place of"),
        ("cut in thought", f"<think>\n{THOUGHT}", ""),
        ("cut in thought", f"<think>\n{THOUGHT}\n</think>\n\n", "cut off"),
    ],
)
def test_the_oracle_sees_a_text_that_is_not_sampled(kind, learnt, reason):
    tokenizer, ends = tokenizer_of(SHAPES["history drops thoughts"])
    question = list(CHATS[kind].messages[:1])
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, enable_thinking=True, return_dict=False
    )
    ids = prompt + tokenizer(learnt, add_special_tokens=False)["input_ids"]
    document = Rendered(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt))
    outcome = judge(tokenizer, ends, CHATS[kind], [document])
    assert outcome.verdict == ("WRONG" if reason else "right") and reason in outcome.reason


def test_the_oracle_sees_a_refusal_without_need():
    tokenizer, ends = tokenizer_of(SHAPES["turns with headers"])
    for kind, verdict in (("one turn", "WRONG"), ("reasoning", "refused"), ("call", "refused")):
        assert judge(tokenizer, ends, CHATS[kind], ConversationError("no end token")).verdict == verdict


@pytest.fixture
def folder(tmp_path):
    """Folder with a template alone, a model's templates by name, and one beside a model's own settings."""
    chatml = SHAPES["turns with headers"]
    (tmp_path / "alone.jinja").write_text(SHAPES["history drops thoughts"].text)
    entries = [{"name": name, "template": chatml.text} for name in ("default", "tool_use")]
    for name, template in (("several", entries), ("one", chatml.text)):
        settings = {"eos_token": {"content": "<|im_end|>"}, "chat_template": template}
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "chat_template.jinja").write_text(SHAPES["the next role's marker ends a turn"].text)
    ends = SHAPES["the next role's marker ends a turn"].ends
    added = {str(i + 7): {"content": token, "special": True} for i, token in enumerate(ends)}
    (tmp_path / "beside" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "beside" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8, 9]}))
    return tmp_path


def test_preview_shows_a_table_of_the_templates_of_a_folder(folder, capsys):
    assert preview.main(["--templates", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        line.split()[0]: line.split()[1:] for line in lines if line.startswith(("alone", "beside", "one", "several"))
    }
    assert set(rows) == {"alone", "beside", "one", "several"}
    assert set(rows["alone"]) == {"right"} and "-" in rows["one"] and len(rows["one"]) == len(CHATS)
    assert any("does not write the reasoning" in line for line in lines) and lines[-1].endswith(" 0 WRONG")


def test_a_template_that_refuses_every_chat_gives_status_1(folder):
    (folder / "alone.jinja").write_text("{{ raise_exception('no') }}")
    assert preview.main(["--templates", str(folder)]) == 1


def test_a_folder_without_templates_is_refused(tmp_path):
    with pytest.raises(UserError, match="no chat templates"):
        preview.main(["--templates", str(tmp_path)])
    with pytest.raises(UserError, match="no folder"):
        preview.main(["--templates", str(tmp_path / "missing")])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        preview.main(["--templates", str(tmp_path)])
