"""Any conversations: what is supervised is what was answered, once, through rendering, packing and the disk."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jeagle.config import DataConfig
from jeagle.data import ConversationError, Rendered, RowWriter, load_rows, rows_of, unpack
from jeagle.data.chat.render import Renderer
from jeagle.data.rows import Packer
from jeagle.data.sources.conversations import Conversation
from tests.data.chats import CALL, KINDS, TOOL, end_ids, tokenizer_for
from tests.data.helpers import pack

words = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"), include_characters="\n"), max_size=30
)
said = words.filter(lambda text: text.strip() != "")
turns = st.lists(st.tuples(said, said), min_size=1, max_size=3)
systems = st.one_of(st.none(), said)


def messages_of(system, pairs) -> tuple[dict, ...]:
    lead = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return (*lead, *({"role": r, "content": t} for pair in pairs for r, t in zip(roles, pair, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "qwen3-thinking", "deepseek"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(chats=st.lists(st.tuples(systems, turns), min_size=1, max_size=4))
def test_every_answer_token_is_supervised_once_and_nothing_else_is(template, kind, chats):
    """By another way than the mask's: the server's own prompt, and the end token that follows it."""
    tokenizer = tokenizer_for(template, kind)
    conversations = [Conversation("", messages_of(*chat)) for chat in chats]
    options = {"enable_thinking": False, "thinking": False, "return_dict": False, "add_generation_prompt": True}
    renderer = Renderer(tokenizer, DataConfig(), end_ids(tokenizer))
    for conversation, made in zip(conversations, renderer(conversations), strict=True):
        if isinstance(made, ConversationError):  # an answer that the tokenizer joins with what stands around it
            assert "joins" in str(made) or "other text" in str(made)
            continue
        cuts = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        learnt = collections.Counter()
        for cut, document in zip(cuts, made if len(made) > 1 else made * len(cuts), strict=True):
            prompt = tokenizer.apply_chat_template(list(conversation.messages[:cut]), **options)
            ids = document.ids.tolist()
            end = ids.index(tokenizer.eos_token_id, len(prompt)) + 1
            assert document.supervised[len(prompt) : end].all() and not document.supervised[len(prompt) - 1]
            learnt[id(document)] += end - len(prompt)
        assert all(learnt[id(d)] == d.supervised.sum() for d in made)


@settings(max_examples=30, deadline=None)
@given(question=said, result=said, answer=said, city=said)
def test_tool_calls_are_supervised_and_results_never(question, result, answer, city):
    tokenizer = tokenizer_for("qwen")
    call = {
        "type": "function",
        "function": {"name": "weather", "arguments": CALL["function"]["arguments"] | {"city": city}},
    }
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    )
    [made] = Renderer(tokenizer, DataConfig(), end_ids(tokenizer))([Conversation("", messages, tools=(TOOL,))])
    if isinstance(made, ConversationError):
        return
    [document] = made
    edges = np.flatnonzero(np.diff(np.pad(document.supervised.astype(int), 1))).reshape(-1, 2)
    texts = [tokenizer.decode(document.ids[a:b]) for a, b in edges]
    assert len(texts) == 2 and texts[0].startswith("<tool_call>") and texts[1] == f"{answer}<|im_end|>"


documents = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=40).map(
        lambda pairs: Rendered(np.array([a for a, _ in pairs], np.int32), np.array([b for _, b in pairs]))
    ),
    max_size=30,
)


def key(document: Rendered) -> tuple:
    return tuple(document.ids.tolist()), tuple(document.supervised.tolist())


@pytest.mark.parametrize("long", ["cut", "split", "drop"])
@settings(max_examples=50, deadline=None)
@given(found=documents, row_length=st.integers(4, 24))
def test_long_documents_are_cut_split_or_dropped_as_configured(long, found, row_length):
    packed = pack(found, row_length, long)
    over = sum(len(d.ids) > row_length for d in found)
    packer = packed.packer
    assert (packer.truncated, packer.split, packer.dropped) == tuple(
        over * (long == n) for n in ("cut", "split", "drop")
    )
    learnt = sum(int(d.supervised.sum()) for d in unpack(packed.rows))
    if long == "split":
        assert learnt == sum(int(d.supervised.sum()) for d in found)
    elif long == "drop":
        kept = [d for d in found if len(d.ids) <= row_length and d.supervised.any()]
        assert sorted(map(key, unpack(packed.rows))) == sorted(map(key, kept))


@settings(max_examples=30, deadline=None)
@given(found=documents, row_length=st.integers(8, 24))
def test_rows_that_are_written_as_they_close_equal_rows_in_memory(tmp_path_factory, found, row_length):
    folder = tmp_path_factory.mktemp("rows")
    packer = Packer(row_length)
    with RowWriter(folder, row_length) as writer:
        for document in found:
            for group in packer.add(document):
                writer.write(rows_of([group], row_length))
        writer.write(rows_of(packer.finish(), row_length))
    for a, b in zip(load_rows(folder), pack(found, row_length).rows, strict=True):
        np.testing.assert_array_equal(a, b)
