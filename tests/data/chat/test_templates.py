"""Each template: ids are transformers' own, and what is supervised is what a server samples, end token included."""

# ruff: noqa: RUF001 (DeepSeek names its tokens with full-width bars)

from __future__ import annotations

import numpy as np
import pytest

from jeagle.config import DataConfig
from jeagle.data import ConversationError, use_template
from jeagle.data.chat.render import Renderer
from jeagle.data.chat.templates import TEMPLATES, from_headers
from jeagle.data.sources.columns import Columns
from jeagle.data.sources.conversations import Conversation
from jeagle.data.sources.schema import messages_of, shown
from jeagle.errors import UserError
from tests.data.chats import CALL, CHATS, KINDS, SPECIAL, TOOL, TOOL_CHAT, USER, end_ids, make_tokenizer, tokenizer_for
from tests.data.helpers import render

# What a server samples for each answer of CHATS["multi"]: the literal text, written by hand.
SAMPLED = {
    "chatml": "{}<|im_end|>",
    "deepseek": "{}<｜end▁of▁sentence｜>",
    "gemma": "{}<end_of_turn>",
    "gpt-oss": "<|channel|>final<|message|>{}<|return|>",
    "llama3": "{}<|eot_id|>",
    "llama3.1": "{}<|eot_id|>",
    "llama4": "{}<|eot|>",
    "mistral": " {}</s>",
    "phi": "{}<|end|>",
    "phi4": "{}<|im_end|>",
    "qwen": "{}<|im_end|>",
    "qwen3-thinking": "{}<|im_end|>",
    "vicuna": " {}</s>",
}
THINKING = {
    "qwen3-thinking": "<think>\na red bird\n</think>\n\nsat on a mat<|im_end|>",
    "gpt-oss": "<|channel|>analysis<|message|>a red bird<|end|>"
    "<|start|>assistant<|channel|>final<|message|>sat on a mat<|return|>",
    "deepseek": "a red bird\n</think>\n\nsat on a mat<｜end▁of▁sentence｜>",
}
CALLS = {
    "llama3.1": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "llama4": '<|python_start|><|python_end|>{"name": "weather", "parameters": {"city": "Paris"}}<|eot|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>',
    "qwen": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    "qwen3-thinking": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
    "gpt-oss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
}


def documents(tokenizer, messages, tools=(), **rules):
    """[(ids, supervised texts)], after the ids were compared with transformers'."""
    conversation = Conversation("", tuple(messages), tools=tuple(tools))
    found = Renderer(tokenizer, DataConfig(**rules), end_ids(tokenizer))([conversation], [True])[0]
    if isinstance(found, ConversationError):
        raise found
    return [(d.ids.tolist(), spans(tokenizer, d)) for d in found]


def spans(tokenizer, document) -> list[str]:
    """The text of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.pad(document.supervised.astype(int), 1)))
    return [tokenizer.decode(document.ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("chat", ["single", "multi", "system", "unicode"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_text_is_what_a_server_samples(template, chat):
    tokenizer, messages = tokenizer_for(template), CHATS[chat]
    made = documents(tokenizer, messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [text for _, texts in made for text in texts] == [SAMPLED[template].format(a) for a in answers]
    if len(made) == 1:
        options = {"enable_thinking": False, "thinking": False}
        assert made[0][0] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_document_begins_with_what_the_server_reads(template):
    tokenizer, messages = tokenizer_for(template), CHATS["multi"]
    made = documents(tokenizer, messages)
    cuts = [1, 3]
    if len(made) == 1:
        made *= 2
    for cut, (ids, _) in zip(cuts, made, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:cut], add_generation_prompt=True, enable_thinking=False, thinking=False, return_dict=False
        )
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("template", THINKING)
@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_is_supervised_if_it_is_sampled(template, inline):
    if inline and template == "gpt-oss":
        pytest.skip("its reasoning never stands in the text")
    messages = CHATS["reasoning"]
    if inline:
        messages = [USER, {"role": "assistant", "content": "<think>\na red bird\n</think>\n\nsat on a mat"}]
    assert documents(tokenizer_for(template), messages)[0][1] == [THINKING[template]]
    dropped = documents(tokenizer_for(template), messages, reasoning="drop")[0][1]
    assert dropped == [SAMPLED[template].format("sat on a mat")]


def test_reasoning_reaches_a_template_that_calls_it_thinking():
    """As gpt-oss's released template does: its name there is not the one that messages have."""
    tokenizer = make_tokenizer("byte_bpe", "<|im_end|>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role + ':' }}{% if 'thinking' in message %}"
        "{{ '[' + message.thinking + ']' }}{% endif %}{{ message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    messages = CHATS["reasoning"]
    assert documents(tokenizer, messages)[0][1] == ["[a red bird]sat on a mat<|im_end|>"]
    assert "thinking" not in messages[1]


def test_earlier_reasoning_is_shown_as_the_server_shows_it():
    """Qwen 3 drops it from the history: one document for each answer, none of which is learnt twice."""
    tokenizer = tokenizer_for("qwen3-thinking")
    messages = [*CHATS["reasoning"], {"role": "user", "content": "and?"}, CHATS["reasoning"][1]]
    first, second = documents(tokenizer, messages)
    assert first[1] == second[1] == [THINKING["qwen3-thinking"]]
    assert tokenizer.decode(second[0]).count("a red bird") == 1
    with pytest.raises(ConversationError, match="earlier turns"):
        documents(tokenizer, messages, rewritten="reject")


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - set(THINKING)))
def test_reasoning_that_a_template_drops_is_an_error(template):
    with pytest.raises(ConversationError, match="does not write the reasoning"):
        documents(tokenizer_for(template), CHATS["reasoning"])


@pytest.mark.parametrize("template", CALLS)
def test_tool_calls_are_supervised_and_their_results_are_not(template):
    made = documents(tokenizer_for(template), TOOL_CHAT, [TOOL])
    assert [t for _, texts in made for t in texts] == [
        CALLS[template],
        SAMPLED[template].format("It is 18 degrees there"),
    ]


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) - set(CALLS)))
def test_tool_calls_that_a_template_cannot_write_are_refused(template):
    with pytest.raises(ConversationError):
        documents(tokenizer_for(template), TOOL_CHAT, [TOOL])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "gemma", "qwen3-thinking"])
def test_the_mask_is_at_the_same_position_for_every_kind_of_tokenizer(template, kind):
    """The answer's tokens are those that follow the generation prompt's, up to the end token."""
    tokenizer = tokenizer_for(template, kind)
    for chat in ("single", "multi", "system", "unicode"):
        [made] = Renderer(tokenizer, DataConfig(), end_ids(tokenizer))([Conversation("", tuple(CHATS[chat]))], [True])
        assert not isinstance(made, ConversationError), made
        cuts = [i for i, m in enumerate(CHATS[chat]) if m["role"] == "assistant"]
        wanted = []
        for cut in cuts:
            options = {"enable_thinking": False, "return_dict": False}
            prompt = tokenizer.apply_chat_template(CHATS[chat][:cut], add_generation_prompt=True, **options)
            ids = made[0 if len(made) == 1 else len(wanted)].ids.tolist()
            assert ids[: len(prompt)] == prompt
            wanted.append((len(prompt), ids.index(tokenizer.eos_token_id, len(prompt)) + 1))
        learnt = [np.flatnonzero(d.supervised).tolist() for d in made]
        if len(made) == 1:
            assert learnt == [[i for a, b in wanted for i in range(a, b)]]
        else:
            assert learnt == [list(range(a, b)) for a, b in wanted]


def test_a_template_made_of_headers_equals_the_named_template():
    """SpecForge's llama3, by its headers, gives the ids of the named template."""
    llama = tokenizer_for("llama3")
    other = make_tokenizer("byte_bpe", *SPECIAL["llama3"][:2], tuple(SPECIAL["llama3"][2]))
    headers = {
        "user_header": "<|start_header_id|>user<|end_header_id|>\\n\\n",
        "assistant_header": "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        "end_of_turn": "<|eot_id|>",
    }
    use_template(other, **headers)
    for chat in ("single", "multi", "system", "unicode"):
        assert documents(other, CHATS[chat]) == documents(llama, CHATS[chat])
    with pytest.raises(UserError, match="end-of-turn is missing"):
        use_template(other, user_header="a", assistant_header="b")
    with pytest.raises(UserError, match="exclude"):
        use_template(other, "qwen", **headers)


def test_headers_with_quotes_and_braces_are_not_changed():
    tokenizer = make_tokenizer("byte_bpe", "<|im_end|>")
    tokenizer.chat_template = from_headers('{{"user"}}\n', "it's {% me %}: ", "<|im_end|>")
    text = tokenizer.apply_chat_template(CHATS["system"], tokenize=False)
    assert text == '{{"system"}}\nbe old<|im_end|>{{"user"}}\nthe cat?<|im_end|>it\'s {% me %}: sat on a mat<|im_end|>'


def test_a_users_template_is_used_and_an_invalid_one_is_a_user_error(tmp_path):
    tokenizer = make_tokenizer("byte_bpe", "<|im_end|>")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    use_template(tokenizer, str(tmp_path / "mine.jinja"))
    found = render(tokenizer, CHATS["single"], end_token_ids=(tokenizer.eos_token_id,), check_ids=True)
    assert spans(tokenizer, found) == ["sat on a mat<|im_end|>"]
    (tmp_path / "bad.jinja").write_text("{% for m in %}")
    with pytest.raises(UserError, match="bad.jinja cannot be used"):
        use_template(tokenizer, str(tmp_path / "bad.jinja"))
    with pytest.raises(UserError, match="did you mean llama3"):
        use_template(tokenizer, "lama3")


def test_arguments_as_text_and_as_objects_render_alike():
    text = [TOOL_CHAT[0], TOOL_CHAT[1] | {"content": None}, *TOOL_CHAT[2:]]
    text[1] = text[1] | {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}]}
    tree = [TOOL_CHAT[0], TOOL_CHAT[1] | {"tool_calls": [CALL]}, *TOOL_CHAT[2:]]
    made = [messages_of({"messages": m}, Columns(chat="messages")) for m in (text, tree)]
    assert [shown(m) for m in made[0]] == made[1]  # rows keep what they have; a template gets objects
    for template in CALLS:
        first, second = (documents(tokenizer_for(template), messages, [TOOL]) for messages in made)
        assert first == second
