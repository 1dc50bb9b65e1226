"""What becomes of rows as people have them: learnt as they are meant, or rejected with a reason; nothing in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jeagle.config import DataConfig
from jeagle.data import load_rows, parse_source, prepare_rows, read_prompts
from jeagle.data.sources.columns import NAMES, find_columns, parse_columns, thinking_of, unused
from jeagle.data.sources.schema import ANSWERING, messages_of, unused_fields
from jeagle.errors import UserError
from tests.data.chats import end_ids, tokenizer_for
from tests.data.helpers import read_conversations
from tests.data.sources.row_shapes import MAKERS, rows_in_shape

USER = {"role": "user", "content": "a question"}
ANSWER = {"role": "assistant", "content": "an answer"}


def learnt(message: dict[str, Any]) -> str:
    """All that a message teaches, as one text."""
    if message["role"] == "ids":
        return str([i for i, on in zip(message["ids"], message["mask"], strict=True) if on])
    calls = [call["function"] for call in message.get("tool_calls", ())]
    written = [f"{call['name']} {text(call['arguments'])}" for call in calls]
    return " ".join(filter(None, [message.get("reasoning_content"), message.get("content"), *written]))


def text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def parse(row: dict[str, Any], columns: str = "") -> list[dict[str, Any]]:
    return messages_of(row, find_columns(row, parse_columns(columns)))


def refusal(row: dict[str, Any], columns: str = "") -> str:
    with pytest.raises(ValueError) as error:
        parse(row, columns)
    return str(error.value)


@pytest.mark.parametrize("name", MAKERS)
def test_a_hundred_rows_in_the_shape_of_a_dataset(tmp_path, name):
    groups, expected = rows_in_shape(name)
    lines = [json.dumps(row, ensure_ascii=False) for rows in groups for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    first = {}
    for number in range(len(groups)):
        first[f"{tmp_path}/rows.jsonl:{1 + sum(map(len, groups[:number]))}"] = number
    log = Log()
    reading = read_conversations(str(tmp_path / "rows.jsonl"), bad_share=1.0, log=log)
    reasons = {first[entry["where"]]: entry["reason"] for entry in log.entries}
    found = {first[c.where]: c for c in reading.conversations}
    assert len(reasons) + len(found) + reading.duplicates == len(groups) and len(found) > 50
    for number, wanted in enumerate(expected):
        if isinstance(wanted, str):
            assert wanted in reasons[number], number
        elif number in found:
            taught = [m for m in found[number].messages if m["role"] in ANSWERING and m.get("learn", True)]
            calls = [learnt(m) for m in taught]
            assert " ".join(calls) == " ".join(wanted), number
    columns = {column for row in groups[0] for column, value in row.items() if value not in (None, "", [], {})}
    shown = str([str(c) for _, c in reading.columns]) + json.dumps(reading.unused_columns())
    if name != "oasst2" and not isinstance(expected[0], str):
        texts = json.dumps([m for c in reading.conversations for m in c.messages], ensure_ascii=False)
        for column in columns - {"tools", "model", "generator", "reasoning", "model_name"}:
            value = groups[0][0].get(column)
            assert column in shown or (isinstance(value, str) and value in texts), column


class Log:
    """Takes the lines of rejected.jsonl."""

    def __init__(self):
        self.entries = []

    def write(self, line: str) -> None:
        self.entries.append(json.loads(line))


CUT = {
    "finish_reason": {"finish_reason": "length"},
    "an enum": {"finish_reason": "FinishReason.MAX_TOKENS"},
    "camel case": {"finishReason": "MAX_TOKENS"},
    "stop_reason": {"stop_reason": "max_tokens"},
    "truncated": {"truncated": True},
    "was truncated": {"was_truncated": 1},
    "not complete": {"is_complete": False},
    "metadata": {"metadata": {"finish_reason": "length"}},
    "metadata as text": {"metadata": json.dumps({"finish_reason": "max_length"})},
    "SGLang": {"meta_info": {"finish_reason": {"type": "length", "length": 7}}},
    "Responses": {"incomplete_details": {"reason": "max_output_tokens"}},
    "deep": {"response_metadata": {"usage": {"n": 1}, "info": {"stopReason": "max_tokens"}}},
}
ENDED = (
    {},
    {"finish_reason": "stop"},
    {"finish_reason": None},
    {"truncated": False},
    {"metadata": {"finish_reason": "tool_calls"}},
)


@pytest.mark.parametrize("kind", CUT)
def test_a_mark_of_a_cut_answer_is_found_wherever_it_stands(kind):
    mark, two = CUT[kind], [USER, ANSWER, USER, ANSWER]
    assert "cut" in parse({"messages": [USER, ANSWER]} | mark)[-1]
    assert "cut" in parse({"prompt": "a", "response": "b"} | mark)[-1]
    assert "cut" in parse({"text": "b"} | mark)[-1]
    assert [m.get("cut", False) for m in parse({"messages": two} | mark)] == [False, False, False, True]
    assert [m.get("cut", False) for m in parse({"messages": [USER, ANSWER | mark, USER, ANSWER]})] == [
        False,
        True,
        False,
        False,
    ]
    for ended in ENDED:
        assert not any("cut" in m for m in parse({"messages": [USER, ANSWER | ended]} | ended))


@pytest.mark.parametrize(
    ("more", "cut"),
    [
        ({"finish_reasons": ["length", "stop"]}, [True, False]),
        ({"finish_reasons": [None, "stop", None, "length"]}, [False, True]),
        ({"truncated": [False, True]}, [False, True]),
        ({"finish_reasons": ["stop", "stop", "length"]}, [True, True]),  # of other answers, perhaps of these
        ({"finish_reasons": ["stop", "stop", "stop"]}, [False, False]),
        ({"metadata": [{"finish_reason": "length"}, {"finish_reason": "stop"}]}, [True, False]),
        ({"choices": [{"index": 0, "finish_reason": "length"}]}, [False, True]),
    ],
)
def test_lists_of_marks_go_to_their_answers(more, cut):
    messages = parse({"messages": [USER, ANSWER, USER, ANSWER]} | more)
    assert [m.get("cut", False) for m in messages if m["role"] == "assistant"] == cut


@pytest.mark.parametrize(
    "turn",
    [
        {"weight": 0},
        {"train": False},
        {"loss": False},
        {"trainable": 0.0},
        {"masked": True},
        {"loss_mask": 0},
        {"learn": False},
    ],
)
def test_turns_that_are_not_to_be_learnt_are_not(turn):
    messages = parse({"messages": [USER, ANSWER | turn, USER | {"weight": 1}, ANSWER | {"weight": 1.0}]})
    assert [m.get("learn", True) for m in messages] == [True, False, True, True]


def test_masks_of_turns_are_followed_or_refused():
    chat = [USER, ANSWER, USER, ANSWER]
    for values in ([0, 0, 0, 1], [0, 1]):
        assert [m.get("learn", True) for m in parse({"messages": chat, "loss_mask": values})] == [
            True,
            False,
            True,
            True,
        ]
    assert "loss_mask" in refusal({"messages": chat, "loss_mask": [0, 1, 1]})
    assert "weight 0.5" in refusal({"messages": [USER, ANSWER | {"weight": 0.5}]})
    mixed = [USER, ANSWER | {"mask": True}, USER, ANSWER | {"mask": False}]
    assert "--data.columns ignore=mask" in refusal({"messages": mixed})
    assert parse({"messages": mixed}, "ignore=mask") == parse({"messages": chat})


REASONING = [
    "THOUGHT",
    {"text": "THOUGHT"},
    {"content": "THOUGHT"},
    [{"type": "reasoning.text", "text": "THO", "index": 0}, {"type": "reasoning.text", "text": "UGHT"}],
]


@pytest.mark.parametrize("value", REASONING, ids=range(len(REASONING)))
@pytest.mark.parametrize("name", NAMES["reasoning"])
def test_reasoning_is_read_from_columns_and_fields_in_any_form(name, value):
    rows = [
        {"messages": [USER, ANSWER | {name: value}]},
        {"messages": [USER, ANSWER], name: value},
        {"prompt": "a question", "response": "an answer", name: value},
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "THOUGHT"}, {"type": "text", "text": "an answer"}],
                },
            ]
        },
    ]
    assert [parse(row)[-1] for row in rows] == [ANSWER | {"reasoning_content": "THOUGHT"}] * 4
    assert parse({"messages": [USER, {"role": "assistant", "content": None, name: value}]})[-1]["content"] == ""


def test_reasoning_that_is_not_what_was_sampled_is_refused():
    for kind in ("reasoning.encrypted", "reasoning.summary"):
        assert kind in refusal({"messages": [USER, ANSWER | {"reasoning_details": [{"type": kind, "data": "x"}]}]})
    two = {"reasoning": "one", "thinking": "two"}
    assert "several fields of reasoning" in refusal({"messages": [USER, ANSWER | two]})
    assert parse({"messages": [USER, ANSWER | two]}, "ignore=thinking")[-1]["reasoning_content"] == "one"
    assert "which answer" in refusal({"messages": [USER, ANSWER, USER, ANSWER], "reasoning": "one"})


@pytest.mark.parametrize(
    ("row", "switch"),
    [
        ({"reasoning": "on"}, True),
        ({"reasoning": "off"}, False),
        ({"thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning": "on the whole"}, None),
    ],
)
def test_the_thinking_switch_of_a_row_is_no_reasoning(row, switch):
    assert thinking_of(row) is switch
    assert ("reasoning_content" in parse({"messages": [USER, ANSWER]} | row)[-1]) == (switch is None)


PAIR = {"question": "a question", "answer": "an answer"}


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        (PAIR | {"context": "CTX"}, "", "a question\n\nCTX"),
        (PAIR | {"input": "CTX"}, "", "a question\n\nCTX"),
        (PAIR | {"passage": "CTX"}, "context=passage", "a question\n\nCTX"),
        (PAIR | {"passage": "CTX"}, "ignore=passage", "a question"),
        (PAIR | {"choices": ["x", "y"]}, "context=choices", 'a question\n\n["x", "y"]'),
        (PAIR | {"output": "other"}, "prompt=question,answer=answer", "a question"),
        (PAIR | {"image": "a.png"}, "ignore=image", "a question"),
        ({"messages": [USER, ANSWER], "documents": ["CTX"]}, "context=documents", 'a question\n\n["CTX"]'),
    ],
)
def test_columns_that_matter_are_used_or_decided_by_the_user(row, columns, prompt):
    messages = parse(row, columns)
    assert (messages[0]["content"], messages[-1]["content"]) == (prompt, "an answer")
    if "=" in columns:
        name = columns.split(",")[-1].partition("=")[2]
        assert f"the column {name} " in refusal(row)


@pytest.mark.parametrize("name", ["image", "images", "image_path", "video_url", "audios", "pixel_values", "Image"])
def test_images_and_sounds_reject_their_row_unless_they_are_ignored(name):
    rows = [PAIR | {name: ["a"]}, {"messages": [USER | {name: "a"}, ANSWER]}, {"text": "a text", name: {"bytes": "a"}}]
    for row in rows:
        assert f"the column {name} holds what the target does not see" in refusal(row)
        assert parse(row, f"ignore={name}")
    assert parse(PAIR | {name: None, "image_count": 2, "videos": []})


def test_a_column_that_the_user_names_must_be_there():
    assert "no column reply, which --data.columns names" in refusal(PAIR, "prompt=question,answer=reply")
    for wrong in ("prompt", "reply=x", "prompt=a,prompt=b", "chat=a,prompt=b", "ids=a"):
        with pytest.raises(UserError, match="--data.columns"):
            parse_columns(wrong)


def test_history_comes_before_the_prompt_and_systems_are_not_doubled():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "input": "i", "system": "s"}
    assert [m["content"] for m in parse(row)] == ["s", "a", "b", "c\n\ni", "d"]
    own = [{"role": "system", "content": "s"}, USER, ANSWER]
    assert parse({"messages": own, "system": "s "}) == own
    assert "the column system differs" in refusal({"messages": own, "system": "t"})


def test_tools_that_the_system_turn_lists_are_not_given_to_the_template_again(tmp_path):
    tools = json.dumps([{"name": "find"}])
    rows = [{"messages": [{"role": "system", "content": s}, USER, ANSWER], "tools": tools} for s in ("<tools>x", "x")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_conversations(str(tmp_path / "x.jsonl"))
    assert [c.tools for c in reading.conversations] == [(), ({"name": "find"},)]
    assert list(reading.notes.values()) == [1]


def test_prompts_and_answers_may_be_turns_or_their_json():
    chosen = [USER, ANSWER]
    for prompt in (json.dumps([USER]), [USER], "a question"):
        for answer in ("an answer", [ANSWER], ANSWER, [{"message": ANSWER, "finish_reason": "stop"}]):
            assert parse({"prompt": prompt, "response": answer}) == chosen
    assert "--data.columns" in refusal({"prompt": "a question", "chosen": chosen, "rejected": chosen})
    assert parse({"prompt": "a question", "chosen": chosen, "rejected": "x"}, "prompt=prompt,answer=chosen") == chosen
    assert "has 2 answers" in refusal({"prompt": "a", "generations": ["b", "c"]}, "prompt=prompt,answer=generations")
    assert parse({"messages": [USER], "choices": [{"message": ANSWER, "finish_reason": "length"}]})[-1]["cut"]


@pytest.mark.parametrize(
    ("row", "result"),
    [
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, [2, 3]),
        ({"input_ids": [[1, 2, 3]], "loss_mask": [[0, 0, 1]]}, [3]),
        ({"input_ids": [0, 0, 3, 4], "attention_mask": [0, 0, 1, 1], "loss_mask": [1, 0, 0, 1]}, [4]),
        ({"input_ids": [1, 2], "assistant_masks": [0, 1], "messages": [USER, ANSWER]}, [2]),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "labels are not -100 or the id"),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "not a list of token ids"),
        ({"input_ids": [1, 2**40], "loss_mask": [1, 1]}, "not a list of token ids"),
        ({"input_ids": [1, 2], "loss_mask": [0.5, 1]}, "values other than 0 and 1"),
    ],
)
def test_ids_with_a_mask_are_taken_as_they_are(row, result):
    if isinstance(result, str):
        assert result in refusal(row)
    else:
        assert learnt(parse(row)[0]) == str(result)


@pytest.mark.parametrize("more", [{"input_ids": [1, 2]}, {"input_ids": [1], "loss_mask": "01"}, {"prompt": "a"}])
def test_a_text_that_may_hold_a_prompt_is_not_learnt_whole(more):
    row = {"text": "a question and an answer"} | more
    assert "--data.columns" in refusal(row)
    assert parse(row, "text=text")[0]["role"] == "text"


def test_prompts_are_read_from_all_of_these_rows(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "chosen": "x", "rejected": "y"},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [p["messages"][0] for p in read_prompts(str(tmp_path / "p.jsonl"))]
    assert [p.get("content") for p in prompts] == ["a", "b", None] and prompts[2]["ids"] == [1, 2]


OTHERS = [
    "id",
    "source",
    "lang",
    "passage",
    "notes",
    "image",
    "audio",
    "rejected",
    "generations",
    "expected_answer",
    "views",
]
ALL_NAMES = sorted({name for names in NAMES.values() for name in names} | {*OTHERS})


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_marker_in_any_column_is_used_or_named(data):
    """Random sets of columns, each with a marker of its own: no marker goes in silence, and no prompt is learnt."""
    names = data.draw(st.lists(st.sampled_from(ALL_NAMES), min_size=1, max_size=6, unique=True))
    row: dict[str, Any] = {}
    for name in names:
        marker = f"[{name}-marker]"
        forms = [marker, [marker], {"text": marker}, [[marker, marker]], 7]
        if name in NAMES["chat"]:
            forms += [[{"role": "user", "content": f"[{name}-asked]"}, {"role": "assistant", "content": marker}]] * 5
        row[name] = data.draw(st.sampled_from([*forms, *[marker] * 8]))
    try:
        columns = find_columns(row)
        messages = messages_of(row, columns)
    except (ValueError, TypeError, KeyError):
        return
    told = [*unused(row, columns, messages), *unused_fields(row, columns, messages)]
    shown = json.dumps(messages)
    for name in names:
        assert f"[{name}-marker]" in shown or name in told or row[name] == 7, (name, columns)
    taught = " ".join(learnt(m) for m in messages if m["role"] == "assistant")
    assert not any(f"[{name}-marker]" in taught for name in (*NAMES["system"], "context", "passage", "id", "notes"))
    assert "-asked]" not in taught


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("xlam", "apigen", "swe")])
def test_the_rows_of_a_dataset_are_prepared_as_they_are_meant(tmp_path, name):
    """Through the template, the mask and the disk, what is supervised is what was expected."""
    tokenizer = tokenizer_for("qwen")
    groups, expected = rows_in_shape(name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for rows in groups for row in rows))
    config = DataConfig(row_length=2048, held_out=0.0, bad_share=1.0)
    parts, vocab = parse_source(str(tmp_path / "rows.jsonl")), len(tokenizer)
    prepare_rows(parts, tokenizer, config, tmp_path, end_token_ids=end_ids(tokenizer), vocab=vocab)
    rows = load_rows(tmp_path / "train")
    found = []
    for tokens, segments, supervised in zip(rows.tokens_BT, rows.segments_BT, rows.supervised_BT, strict=True):
        for segment in range(1, segments.max() + 1):
            ids = tokens[(segments == segment) & supervised]
            found.append(str(ids.tolist()) if name == "speculators" else tokenizer.decode(ids))
    ended = {answer for answers in found for answer in answers.split("<|im_end|>")}
    wanted = [answer for answers in expected if not isinstance(answers, str) for answer in answers]
    assert {answer.strip() for answer in wanted} == {answer.strip() for answer in ended if answer}


def test_ids_beyond_the_embedding_reject_their_row_with_its_place(tmp_path):
    tokenizer = tokenizer_for("qwen")
    rows = [{"input_ids": [i, 7, last], "loss_mask": [0, 1, 1]} for i, last in enumerate([5, len(tokenizer), 6])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"end_token_ids": end_ids(tokenizer), "vocab": len(tokenizer)}
    config = DataConfig(row_length=8, held_out=0.0, bad_share=0.5)
    statistics = prepare_rows(parse_source(str(tmp_path / "rows.jsonl")), tokenizer, config, tmp_path, **options)
    [line] = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert line["where"] == f"{tmp_path}/rows.jsonl:2" and f"token id {len(tokenizer)} is beyond" in line["reason"]
    assert statistics["train"]["tokens"] == 6
