"""What a target writes in its own form is read as a server's parsers read it, and nothing is ever lost."""

# ruff: noqa: RUF001 - DeepSeek's marks contain a vertical line of full width
from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jeagle.data import parse_answer, use_template
from jeagle.data.chat.parse_answer import CALLS, REASONING
from jeagle.data.chat.templates import ChatTemplate, RenderRequest
from tests.data.chats import tokenizer_for

PROPERTIES = {"s": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}}]
ARGUMENTS = {"s": '5 "x"', "n": 5, "o": {"k": [1, "a{"]}}
TEXT = json.dumps(ARGUMENTS)
PAIRS = [("s", '5 "x"'), ("n", "5"), ("o", '{"k": [1, "a{"]}')]
NAMED = f'{{"name": "f", "arguments": {TEXT}}}'

# The form -> (how it writes one call, what stands around all calls of an answer).
FORMS = {
    "Qwen 3": (f"<tool_call>\n{NAMED}\n</tool_call>\n", "{}"),
    "Qwen 3 Coder": (
        "<tool_call>\n<function=f>\n"
        + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in PAIRS)
        + "</function>\n</tool_call>\n",
        "{}",
    ),
    "GLM-4.5": (
        "<tool_call>f\n"
        + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in PAIRS)
        + "</tool_call>\n",
        "{}",
    ),
    "DeepSeek V3": (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{TEXT}\n```<｜tool▁call▁end｜>\n",
        "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
    ),
    "DeepSeek V3.1": (
        f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{TEXT}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
    ),
    "DeepSeek V3.2": (
        '<｜DSML｜invoke name="f">\n'
        + "".join(
            f'<｜DSML｜parameter name="{k}" string="{str(k == "s").lower()}">{v}</｜DSML｜parameter>\n'
            for k, v in PAIRS
        )
        + "</｜DSML｜invoke>\n",
        "<｜DSML｜function_calls>\n{}</｜DSML｜function_calls>",
    ),
    "Kimi K2": (
        f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{TEXT}<|tool_call_end|>",
        "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>",
    ),
    "MiniMax M2": (
        '<invoke name="f">\n' + "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in PAIRS) + "</invoke>\n",
        "<minimax:tool_call>\n{}</minimax:tool_call>",
    ),
    "Gemma 4": ('<|tool_call>call:f{s:<|"|>5 "x"<|"|>,n:5,o:{k:[1,<|"|>a{<|"|>]}}<tool_call|>', "{}"),
    "Mistral Small 3.2": (f"[TOOL_CALLS]f[ARGS]{TEXT}", "{}"),
    "Llama 3.1": (f'{{"name": "f", "parameters": {TEXT}}}; ', "<|python_tag|>{}"),
    "OLMo 3": (f"f(s='5 \"x\"', n=5, o={ARGUMENTS['o']!r})\n", "<function_calls>{}</function_calls>"),
}
LISTS = {
    "Mistral 7B v0.3": "[TOOL_CALLS] [{}]",
    "Nemotron Nano 2": "<TOOLCALL>[{}]</TOOLCALL>",
    "Hunyuan": "<tool_calls>[{}]</tool_calls>",
    "Granite 3": "<|tool_call|>[{}]",
}


def calls_of(answer: dict) -> list[tuple[str, dict]]:
    calls = [call["function"] for call in answer.get("tool_calls", ())]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", [*FORMS, *LISTS])
def test_calls_are_read_in_each_form(name, count):
    call, around = FORMS.get(name, (NAMED, LISTS.get(name, "")))
    calls = around.replace("{}", ", ".join([call] * count) if name in LISTS else call * count)
    answer = parse_answer(f"I look.\n\n{calls}", tools=TOOLS)
    assert calls_of(answer) == [("f", ARGUMENTS)] * count and answer["content"] == "I look."
    assert parse_answer(calls, tools=TOOLS)["content"] is None
    assert parse_answer(calls) == {"role": "assistant", "content": calls}  # no tools are on offer
    broken = calls[:-9]
    assert parse_answer(f"I look. {broken} and so", tools=TOOLS)["content"] == f"I look. {broken} and so"
    assert parse_answer(calls, tools=TOOLS, template="a template without tools")["content"] == calls


@pytest.mark.parametrize("template", ["qwen", "qwen3-thinking", "gpt-oss", "llama3.1", "llama4"])
def test_what_a_template_writes_is_read_back(template):
    tokenizer = use_template(tokenizer_for(template), template)
    chat, source = ChatTemplate(tokenizer, {}), str(tokenizer.chat_template)
    question = [{"role": "user", "content": "where"}]
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    requests = [RenderRequest(question, TOOLS, True, True), RenderRequest([*question, reply], TOOLS, True, False)]
    prompt, whole = chat.texts(requests)
    assert isinstance(prompt, str) and isinstance(whole, str) and whole.startswith(prompt)
    text = whole.removeprefix(prompt).rstrip()
    for end in ("<|im_end|>", "<|call|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>"):
        text = text.removesuffix(end)
    assert calls_of(parse_answer(text, template=source, prompt=prompt, tools=TOOLS)) == [("f", ARGUMENTS)]


@pytest.mark.parametrize(("begin", "end"), REASONING)
def test_reasoning_is_read_with_its_marks_after_the_prompt_that_opened_it_and_where_it_is_cut_off(begin, end):
    whole = {"role": "assistant", "content": "yes", "reasoning_content": "so"}
    template, cut = f"{begin}{end}", {**whole, "content": None}
    assert parse_answer(f"{begin}so{end}\n\nyes", template=template) == whole
    assert parse_answer(f"so\n{end}\n\nyes", template=template, prompt=f"user {begin}\n") == whole
    assert parse_answer(f"{begin}so", template=template) == cut == parse_answer("so", template=template, prompt=begin)
    assert parse_answer("so", template=template, prompt=f"{begin}{end}") == {"role": "assistant", "content": "so"}
    assert parse_answer(begin, template=template) == {"role": "assistant", "content": begin}
    plain = parse_answer(f"{begin}so{end}yes", template="a template without reasoning")
    assert plain["content"] == f"{begin}so{end}yes" and "reasoning_content" not in plain


def test_channels_of_harmony():
    analysis, final = "<|channel|>analysis<|message|>so<|end|><|start|>assistant", "<|channel|>final<|message|>yes"
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"n": 1}'
    assert parse_answer(analysis + final) == {"role": "assistant", "content": "yes", "reasoning_content": "so"}
    read = parse_answer(analysis + call, tools=TOOLS)
    assert calls_of(read) == [("f", {"n": 1})] and read["content"] is None and read["reasoning_content"] == "so"
    assert parse_answer("<|channel|>analysis<|message|>so") == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "so",
    }
    for odd in (analysis + "and", call.replace("}", ""), "<|channel|>other<|message|>x"):
        assert parse_answer(odd, tools=TOOLS) == {"role": "assistant", "content": odd}


MARKS = sorted(
    {mark for form in CALLS for mark in (form.mark, form.begin or "")} | {m for pair in REASONING for m in pair}
)
PIECES = st.sampled_from([*MARKS, "</tool_call>", "[TOOL_CALLS]f[ARGS]", "{", "}", '{"name": "f"', "<|message|>", "f("])


@given(st.lists(PIECES | st.text(max_size=9), max_size=8).map("".join), st.booleans(), st.sampled_from(["", "<think>"]))
@example("[TOOL_CALLS]" + "[" * 3000, True, "")
@example("<function_calls>" + "(" * 300 + "</function_calls>", True, "")
def test_any_text_is_read_and_without_reasoning_and_calls_it_is_the_content(text, known, prompt):
    answer = parse_answer(text, template="".join(MARKS) if known else "", prompt=prompt, tools=TOOLS)
    assert answer["content"] is not None or answer.keys() & {"reasoning_content", "tool_calls"}
    if len(answer) == 2 and not any(end in text for _, end in REASONING) and "<|START_RESPONSE" not in text:
        assert answer["content"] == text
    for call in answer.get("tool_calls", ()):
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
