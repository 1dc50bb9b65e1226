"""Answer masks: what is supervised is what the target would have sampled, end token included."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from jeagle.data import ConversationError, render_prompt, tokenizer_hash
from tests import tiny
from tests.data.helpers import render


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


TURNS = (("user", "the cat"), ("assistant", "sat on a mat"), ("user", "and?"), ("assistant", "saw one red bird\n"))


@pytest.mark.parametrize("messages", [chat(*TURNS[:2]), chat(*TURNS), chat(("system", "be old"), *TURNS)])
def test_supervised_text_is_the_sampled_text(tokenizer, messages):
    found = render(tokenizer, messages, end_token_ids=(tokenizer.eos_token_id,), check_ids=True)
    assert found.ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    # An answer starts where the generation prompt of the turns before it ends.
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render_prompt(tokenizer, messages[:i])
            assert not found.supervised[len(before) - 1]
            rest = found.ids[len(before) :]
            length = rest.tolist().index(tokenizer.eos_token_id) + 1
            assert found.supervised[len(before) : len(before) + length].all()
            assert tokenizer.decode(rest[: length - 1]) == message["content"]
    answers = sum(m["role"] == "assistant" for m in messages)
    assert (found.ids[found.supervised] == tokenizer.eos_token_id).sum() == answers


def test_the_end_token_of_a_truncated_answer_is_not_supervised(tokenizer):
    ends = (tokenizer.eos_token_id,)
    whole = render(tokenizer, chat(*TURNS), end_token_ids=ends)
    cut = render(tokenizer, chat(*TURNS), end_token_ids=ends, truncated=True)
    np.testing.assert_array_equal(whole.ids, cut.ids)
    assert whole.supervised.sum() == cut.supervised.sum() + 1


def test_the_system_prompt_is_added_only_to_conversations_without_one(tokenizer):
    text = tokenizer.decode(render_prompt(tokenizer, chat(TURNS[0]), system_prompt="stay"))
    assert text.startswith("<|im_start|>system\nstay<|im_end|>")
    own = chat(("system", "mine"), TURNS[0])
    assert "stay" not in tokenizer.decode(render_prompt(tokenizer, own, system_prompt="stay"))


def test_a_template_that_rewrites_history_is_refused(tokenizer, monkeypatch):
    rewriting = tiny.CHATML.replace("m['content']", "(m['content'] if loop.last else 'gone')")
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    with pytest.raises(ConversationError, match="earlier turns"):
        render(tokenizer, chat(*TURNS), end_token_ids=(tokenizer.eos_token_id,))


def test_a_tokenizer_that_leaves_spaces_out_of_its_offsets_gives_the_same_mask(tokenizer, tmp_path):
    from tokenizers import processors

    messages, ends = chat(("user", "the cat"), ("assistant", "  sat on a mat ")), (tokenizer.eos_token_id,)
    plain = render(tokenizer, messages, end_token_ids=ends, check_ids=True)
    tokenizer.save_pretrained(tmp_path)
    trimming = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    found = render(trimming, messages, end_token_ids=ends)
    np.testing.assert_array_equal(found.ids, plain.ids)
    np.testing.assert_array_equal(found.supervised, plain.supervised)


def test_a_template_that_doubles_bos_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    other.bos_token, ends = "<|im_start|>", (tokenizer.eos_token_id,)
    render(other, chat(*TURNS), end_token_ids=ends)
    other.chat_template = "{{ bos_token }}" + tiny.CHATML
    with pytest.raises(ConversationError, match="bos token twice"):
        render(other, chat(*TURNS), end_token_ids=ends)


def test_the_tokenizer_hash_depends_on_all_that_decides_ids(tokenizer, tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)
    splitting = [pre_tokenizers.Digits(individual_digits=True), other.backend_tokenizer.pre_tokenizer]
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitting)
    assert other.get_vocab() == tokenizer.get_vocab() and tokenizer_hash(other) != tokenizer_hash(tokenizer)


def test_a_template_without_an_end_token_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tiny.CHATML.replace("<|im_end|>", ""))
    with pytest.raises(ConversationError, match="no end token"):
        render(tokenizer, chat(*TURNS[:2]), end_token_ids=(tokenizer.eos_token_id,))
