"""Templates of every shape: each answer stands behind its own prompt, and what is learnt is what the target samples.

The templates are generated from their parts, so that what the target samples is known without the renderer: the parts
are those of published templates (named beside each), in other combinations too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jeagle.config import DataConfig
from jeagle.data import ConversationError
from jeagle.data.chat.render import Renderer
from jeagle.data.sources.conversations import Conversation
from tests.data.chats import TOOL, make_tokenizer

SPECIAL = ("<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|call|>", "<|channel>", "<channel|>", "<|final|>")
BLOCKS = {
    "tags": ("<think>\n", "\n</think>\n\n"),  # Qwen 3
    "bare tags": ("<think>", "</think>"),  # DeepSeek V3.1, GLM 4.5
    "channel": ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    "message": ("<|channel>analysis<|final|>", "<|end|><|assistant|>"),  # gpt-oss
}
TOKENIZER = make_tokenizer("byte_bpe", "<|return|>", None, SPECIAL)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The parts of a template.

    Attributes:
      block: the marks of reasoning.
      on, off: what the generation prompt has of them where thinking is on and off.
      kept: which answers are shown with their reasoning: all, those after the last question, or none.
      empty: whether an answer without reasoning is shown with an empty block, and if so which.
      lead: what stands before the text of an answer.
      end: whether answers have an end of their own, only the mark of the next role, or another end in the last turn.
      arguments: whether the arguments of calls must be objects or text.
    """

    block: str = "tags"
    on: str = "nothing"
    off: str = "nothing"
    kept: str = "all"
    empty: str = "none"
    lead: str = ""
    end: str = "own"
    arguments: str = "object"

    @property
    def marks(self) -> tuple[str, str]:
        return BLOCKS[self.block]

    def beginning(self, thinking: bool) -> str:
        """What the generation prompt has of the marks."""
        begin, close = self.marks
        return {"nothing": "", "opened": begin, "closed": begin + close}[self.on if thinking else self.off]

    def template(self) -> str:
        begin, close = map(repr, self.marks)
        kept = {"all": "true", "after the question": "loop.index0 > last.question", "none": "false"}[self.kept]
        empty = {"none": "false", "last": "loop.last", "all": "true"}[self.empty]
        arguments = "call.arguments | tojson" if self.arguments == "object" else "call.arguments"
        own_end, call_end = {
            "own": ("'<|end|>\n'", "'<|end|>\n'"),
            "next role": ("''", "''"),
            "last": ("'<|return|>' if loop.last and not add_generation_prompt else '<|end|>'", "'<|call|>'"),
        }[self.end]
        parts = (
            "{% set last = namespace(question=-1) %}{% for m in messages %}{% if m.role == 'user' %}",
            "{% set last.question = loop.index0 %}{% endif %}{% endfor %}",
            "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|' + m.role + '|>' + m.content }}",
            "{% else %}{{ '<|assistant|>' }}",
            f"{{% if m.reasoning_content and {kept} %}}{{{{ {begin} + m.reasoning_content + {close} }}}}",
            f"{{% elif {empty} %}}{{{{ {begin} + {close} }}}}{{% endif %}}",
            "{% if m.tool_calls %}{{ m.content }}{% for c in m.tool_calls %}{% set call = c.function %}",
            f"{{{{ '[' + call.name + ' ' + {arguments} + ']' }}}}{{% endfor %}}{{{{ {call_end} }}}}",
            f"{{% else %}}{{{{ {self.lead!r} + m.content }}}}{{{{ {own_end} }}}}{{% endif %}}",
            "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}",
            f"{{{{ {self.beginning(True)!r} if enable_thinking else {self.beginning(False)!r} }}}}{{% endif %}}",
        )
        return "".join(parts)

    def sampled(self, message: dict[str, Any], next_role: str, thinking: bool) -> str | None:
        """What the target samples behind the generation prompt; None if the prompt leads to another answer."""
        begin, close = self.marks
        reasoning, before = message.get("reasoning_content"), self.beginning(thinking)
        if before == (begin + close if reasoning else begin):
            return None
        text = (reasoning + close) if reasoning else ""
        text = text if before else begin * bool(reasoning) + text
        text += ("" if message.get("tool_calls") else self.lead) + message["content"]
        for call in message.get("tool_calls", ()):
            text += f"[{call['function']['name']} " + '{"city": "Paris"}]'
        if message.get("cut"):
            return text
        role_mark = f"<|{next_role}|>" if next_role else ""
        last = "<|call|>" if message.get("tool_calls") else "<|return|>"
        return text + {"own": "<|end|>", "next role": role_mark, "last": last}[self.end]

    def shows_empty_block(self, thinking: bool) -> bool:
        """Whether the template shows a plain answer with an empty block that its prompt does not have."""
        return self.empty != "none" and self.beginning(thinking) == ""


FAMILIES = {
    "Qwen 3": Shape(off="closed", kept="after the question", empty="last"),
    "Qwen 3 Thinking": Shape(on="opened", off="opened", kept="after the question", empty="last"),
    "GLM 4.5": Shape("bare tags", off="closed", kept="after the question", empty="all", lead="\n", end="next role"),
    "Gemma 4": Shape("channel", off="closed", kept="none"),
    "gpt-oss": Shape("message", kept="after the question", lead="<|channel>final<|final|>", end="last"),
    "DeepSeek R1": Shape(on="opened", off="opened", kept="none", arguments="text"),
    "DeepSeek V3.1": Shape("bare tags", on="opened", off="closed", kept="none", arguments="text"),
    "MiniMax M2": Shape(on="opened", off="opened", kept="after the question"),
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TEXT_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
USER, TOOL_TURN = {"role": "user", "content": "the cat?"}, {"role": "tool", "name": "weather", "content": "RESULT"}


def answer(content: str, reasoning: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {}) | more


CHATS = {
    "plain": [USER, answer("sat on a mat"), USER, answer("saw one red bird")],
    "reasoning": [USER, answer("sat on a mat", "a red bird"), USER, answer("saw it", "many trees")],
    "calls": [USER, answer("", tool_calls=[CALL]), TOOL_TURN, answer("sat on a mat"), USER, answer("saw it")],
    "text calls": [USER, answer("", tool_calls=[TEXT_CALL]), TOOL_TURN, answer("sat on a mat")],
    "thoughtful calls": [USER, answer("", "a bird", tool_calls=[CALL]), TOOL_TURN, answer("sat", "old trees")],
    "mixed": [USER, answer("sat on a mat", "a red bird"), USER, answer("saw it")],
    "cut": [USER, answer("sat on a", "a red bird", cut=True), USER, answer("saw", "a tree", cut=True)],
}


def render(shape: Shape, messages: list[dict[str, Any]], **more: Any) -> Any:
    TOKENIZER.chat_template = shape.template()
    settings_ = {name: more.pop(name) for name in ("thinking", "rewritten") if name in more}
    conversation = Conversation("", tuple(messages), tools=(TOOL,), **{"thinking": None} | more.pop("row", {}))
    ends = [TOKENIZER.eos_token_id, *more.pop("ends", ())]
    if shape.end == "next role":
        ends += TOKENIZER.convert_tokens_to_ids(["<|user|>", "<|tool|>"])
    return Renderer(TOKENIZER, DataConfig(**settings_), ends)([conversation], [True])[0]


def spans(documents: list[Any]) -> list[tuple[str, str]]:
    """(what stands before it, its text) of each learnt span."""
    found = []
    for document in documents:
        edges = np.flatnonzero(np.diff(np.pad(document.supervised.astype(int), 1))).reshape(-1, 2)
        found += [(TOKENIZER.decode(document.ids[:a]), TOKENIZER.decode(document.ids[a:b])) for a, b in edges]
    return found


def wanted(shape: Shape, messages: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """(the prompt that a server sends, what the target samples) of each answer, by the shape alone."""
    TOKENIZER.chat_template = shape.template()
    shown = [{n: v for n, v in m.items() if n != "cut"} for m in messages]
    for message in shown:
        if "tool_calls" in message:
            message["tool_calls"] = [CALL if shape.arguments == "object" else TEXT_CALL]
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            thinking = bool(message.get("reasoning_content"))
            options = {"tools": [TOOL], "tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
            prompt = TOKENIZER.apply_chat_template(shown[:i], **options)
            next_role = messages[i + 1]["role"] if i + 1 < len(messages) else ""
            refused = not thinking and shape.shows_empty_block(thinking)
            found.append((prompt, None if refused else shape.sampled(message, next_role, thinking)))
    return found


def check(shape: Shape, messages: list[dict[str, Any]]) -> None:
    made, expected = render(shape, messages), wanted(shape, messages)
    if any(text is None for _, text in expected):
        assert isinstance(made, ConversationError) and "reasoning" in str(made), made
        return
    assert not isinstance(made, ConversationError), made
    assert spans(made) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_what_is_learnt_stands_behind_the_prompt_that_a_server_sends(family, chat):
    check(FAMILIES[family], CHATS[chat])


shapes = st.builds(
    Shape,
    block=st.sampled_from(sorted(BLOCKS)),
    on=st.sampled_from(["nothing", "opened"]),
    off=st.sampled_from(["nothing", "closed", "opened"]),
    kept=st.sampled_from(["all", "after the question"]),
    empty=st.sampled_from(["none", "last", "all"]),
    lead=st.sampled_from(["", "\n", "<|final|>"]),
    end=st.sampled_from(["own", "next role", "last"]),
    arguments=st.sampled_from(["object", "text"]),
).filter(
    # Nothing shows where a block begins that stands in every prompt and every answer, unless a tag does.
    lambda shape: "tags" in shape.block or shape.on == "nothing" or shape.off == "nothing" or shape.empty != "all"
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes, chat=st.sampled_from(sorted(CHATS)))
def test_every_combination_of_parts(shape, chat):
    check(shape, CHATS[chat])


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_in_the_text_is_reasoning_in_its_field(family):
    """In the tags of most data sets, and as the target itself writes it, behind a prompt that may have opened it."""
    shape = FAMILIES[family]
    begin, close = shape.marks
    fields = render(shape, [USER, answer("sat on a mat", "a red bird"), USER, answer("saw it", "many trees")])
    for before, after in (("<think>\n", "\n</think>\n\n"), (begin, close + shape.lead), ("", close + shape.lead)):
        texts = [f"{before}a red bird{after}sat on a mat", f"{before}many trees{after}saw it"]
        inline = render(shape, [USER, answer(texts[0]), USER, answer(texts[1])])
        assert spans(inline) == spans(fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_was_cut_while_thinking_stands_behind_the_prompt_that_thinks(family):
    shape = FAMILIES[family]
    begin, _ = shape.marks
    TOKENIZER.chat_template = shape.template()
    options = {"tools": [TOOL], "tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    prompt = TOKENIZER.apply_chat_template([USER], **options)
    wanted_text = "a red bird and so" if shape.on == "opened" else begin + "a red bird and so"
    field, inline = answer("", "a red bird and so", cut=True), answer(begin + "a red bird and so", cut=True)
    assert spans(render(shape, [USER, field])) == spans(render(shape, [USER, inline])) == [(prompt, wanted_text)]
    if shape.on == "opened":  # without any mark, but the row knows that the target was thinking
        bare = render(shape, [USER, answer("a red bird and so", cut=True)], row={"thinking": True})
        assert spans(bare) == [(prompt, wanted_text)]
    unmarked = render(shape, [USER, answer(begin + "a red bird and so")])
    assert isinstance(unmarked, ConversationError) and "never closes" in str(unmarked)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes)
def test_advice_helps_where_it_is_given(shape):
    made = render(shape, CHATS["plain"], thinking="on")
    if isinstance(made, ConversationError) and "--data.thinking off" in str(made):
        assert not isinstance(render(shape, CHATS["plain"], thinking="off"), ConversationError)
    elif isinstance(made, ConversationError):
        assert isinstance(render(shape, CHATS["plain"], thinking="off"), ConversationError)
