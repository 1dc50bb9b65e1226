"""What `prepare` learns from the rows of `regenerate` is what the target sampled, turn by turn, after the same prompt.

Without the sampled ids in the file it is the same, or the row is rejected and counted.
"""

# ruff: noqa: RUF001 - DeepSeek's marks contain a vertical line of full width
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from jeagle.data import use_template
from jeagle.data.regeneration.prompts import make_prompt
from tests.data.chats import make_tokenizer
from tests.run.answering import prepare, random_sampler, regenerate, without_ids

GEMMA4 = """{{ bos_token }}{% if enable_thinking or tools or messages[0].role == 'system' %}<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools or [] %}<|tool>{{ tool.function.name }}<tool|>{% endfor %}<turn|>
{% endif %}{% set open = namespace(turn=false) %}{% for m in messages %}
{%- if m.role == 'user' %}{% if open.turn %}<turn|>
{% endif %}{% set open.turn = false %}<|turn>user
{{ m.content }}<turn|>
{% elif m.role == 'tool' %}<|tool_response>{{ m.content }}<tool_response|>
{%- elif m.role == 'assistant' %}{% if not open.turn %}<|turn>model
{% endif %}{% set open.turn = false %}
{%- if m.reasoning and (m.tool_calls or loop.last) %}
{{- '<|channel>thought\\n' + m.reasoning + '<channel|>' }}{% endif %}
{%- for call in m.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}{
{%- for key in call.function.arguments %}{{ key }}:<|"|>{{ call.function.arguments[key] }}<|"|>{% endfor -%}
}<tool_call|>{% endfor %}{{ m.content }}{% if m.tool_calls %}{% set open.turn = true %}{% else %}<turn|>
{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{% if not open.turn %}<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{% endif %}{% endif %}"""

GLM = """[gMASK]<sop>{% if tools %}<|system|>
# Tools <tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> as <arg_key>k</arg_key>{% endif %}
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}<|user|>
{{ m.content }}{{ '' if enable_thinking else '/nothink' }}
{%- elif m.role == 'system' %}<|system|>
{{ m.content }}{% elif m.role == 'tool' %}<|observation|>
<tool_response>
{{ m.content }}
</tool_response>{% else %}<|assistant|>
{%- set thought = m.reasoning_content if loop.index0 > last.user else '' %}
{{ '<think>' + (thought or '').strip() + '</think>' }}{% if m.content.strip() %}
{{ m.content.strip() }}{% endif %}{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ '' if enable_thinking else '\\n<think></think>' }}{% endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- else %}{% if messages[loop.index0 - 1].role != 'tool' %}<｜Assistant｜></think>{% endif %}
{{- m.content.split('</think>')[-1] }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜>
{{- '<think>' if enable_thinking else '</think>' }}{% endif %}"""


class Shape(NamedTuple):
    """A family's template, and how its targets write an answer.

    Attributes:
      template: Jinja, or the name of one of jeagle's.
      ends: the tokens that end an answer; the second one, if there is one, ends a call.
      more: further special tokens.
      thought: (the prompt, a thought) -> what is sampled before the text; only called if thinking is on.
      call: a call of `look` with the argument {"at": "sea"}.
      text: the answer's text in its form.
    """

    template: str
    ends: tuple[str, ...]
    more: tuple[str, ...]
    thought: Callable[[str, str], str]
    call: str
    text: Callable[[str], str] = str


SHAPES = {
    "Qwen 3": Shape(
        "qwen3-thinking",
        ("<|im_end|>",),
        ("<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        lambda prompt, thought: f"<think>\n{thought}\n</think>\n\n",
        '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>',
    ),
    "gpt-oss": Shape(
        "gpt-oss",
        ("<|return|>", "<|call|>"),
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
        lambda prompt, thought: f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant",
        '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"at": "sea"}',
        lambda text: f"<|channel|>final<|message|>{text}",
    ),
    "Gemma 4": Shape(
        GEMMA4,
        ("<turn|>", "<|tool_response>"),
        (
            "<|turn>",
            "<|channel>",
            "<channel|>",
            "<|tool_call>",
            "<tool_call|>",
            '<|"|>',
            "<tool_response|>",
            "<|think|>",
        ),
        lambda prompt, thought: f"<|channel>thought\n{thought}<channel|>",
        '<|tool_call>call:look{at:<|"|>sea<|"|>}<tool_call|>',
    ),
    "GLM-4.5": Shape(
        GLM,
        ("<|user|>", "<|observation|>"),
        ("<|assistant|>", "<|system|>", "[gMASK]", "<sop>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        lambda prompt, thought: f"\n<think>{thought}</think>\n",
        "<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>sea</arg_value>\n</tool_call>",
    ),
    "DeepSeek V3.1": Shape(
        DEEPSEEK,
        ("<｜end▁of▁sentence｜>",),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        lambda prompt, thought: f"{thought}</think>" if prompt.endswith("<think>") else "",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>"
        '{"at": "sea"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "DeepSeek R1": Shape(
        "deepseek",
        ("<｜end▁of▁sentence｜>",),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        lambda prompt, thought: f"{thought}\n</think>\n\n",
        "",
    ),
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, tuple[Any, tuple[int, ...]]]:
    found = {}
    for name, shape in SHAPES.items():
        tokenizer = make_tokenizer("byte_bpe", shape.ends[0], None, (*shape.ends, *shape.more))
        if shape.template.isidentifier() or "-" in shape.template[:8]:
            use_template(tokenizer, shape.template)
        else:
            tokenizer.chat_template = shape.template
        found[name] = (tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(shape.ends))))
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def with_a_call(number: int) -> list[dict]:
    """A row's turns; its answers are another model's."""
    call = {"id": "theirs", "type": "function", "function": {"name": "look", "arguments": {"at": "land"}}}
    return [
        user(f"what is there {number}"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "theirs", "content": f"gulls {number}"},
        {"role": "assistant", "content": "some gulls"},
        user("and now"),
        {"role": "assistant", "content": "still gulls"},
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_learnt_is_what_was_sampled(name, tokenizers, tmp_path):
    tokenizer, ends = tokenizers[name]
    prompts = [make_prompt([user(f"{turn} {i}") for turn in "abc"], more={"thinking": i % 2 == 0}) for i in range(12)]
    sample = random_sampler(tokenizer, ends, seed=1)
    rows, sampled = regenerate(tokenizer, ends, prompts, tmp_path / "a.jsonl", sample, system_prompt="be kind")
    turns = [[m["role"] for m in row["messages"]] for row in rows if "stopped" not in row]
    assert len(turns) >= 10 and all(roles == ["system", *["user", "assistant"] * 3] for roles in turns)
    learnt, statistics = prepare(tokenizer, ends, tmp_path / "a.jsonl", tmp_path / "data")
    assert learnt == sampled and not statistics["rejected"]
    source = without_ids(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    learnt, statistics = prepare(tokenizer, ends, source, tmp_path / "again")
    assert learnt <= sampled and sum(statistics["rejected"].values()) >= 10  # their texts give other ids


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_a_targets_own_form_is_read_and_written_back(name, thinking, tokenizers, tmp_path):
    """Answers that are well formed are learnt exactly, with their ids in the file and without them."""
    (tokenizer, ends), shape = tokenizers[name], SHAPES[name]

    def sample(prompt: str, turn: int) -> tuple[list[int], bool]:
        thought = shape.thought(prompt, f"the thought {turn}") if thinking else ""
        text = shape.call if turn == 0 and shape.call else shape.text(f"the answer {turn}")
        end = ends[-1] if turn == 0 and shape.call else ends[0]
        return [*tokenizer(thought + text, add_special_tokens=False)["input_ids"], end], True

    more = {"thinking": thinking} | ({"tools": TOOLS} if shape.call else {})
    turns = [with_a_call(i) if shape.call else [user(f"{t} {i}") for t in "abc"] for i in range(3)]
    prompts = [make_prompt(messages, more=more) for messages in turns]
    rows, sampled = regenerate(tokenizer, ends, prompts, tmp_path / "a.jsonl", sample)
    for row in rows:
        replies = [m for m in row["messages"] if m["role"] == "assistant"]
        assert [m["content"] for m in replies] == [
            None if shape.call else "the answer 0",
            "the answer 1",
            "the answer 2",
        ]
        assert ("reasoning_content" in replies[0]) is thinking
        if shape.call:
            [call] = replies[0]["tool_calls"]
            assert call["function"] == {"name": "look", "arguments": '{"at": "sea"}'}
            assert row["messages"][2]["tool_call_id"] == call["id"] and row["messages"][2]["role"] == "tool"
    learnt, statistics = prepare(tokenizer, ends, tmp_path / "a.jsonl", tmp_path / "data")
    assert learnt == sampled and not statistics["rejected"]
    source = without_ids(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    learnt, statistics = prepare(tokenizer, ends, source, tmp_path / "again")
    assert (learnt == sampled) is not bool(statistics["rejected"]) and learnt <= sampled
