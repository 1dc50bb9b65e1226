"""Known ways in which training data goes wrong in silence: each fault is planted, and is seen."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jeagle import align
from jeagle import flags as configs
from jeagle.config import DataConfig, RunConfig
from jeagle.data import ConversationError, load_rows, parse_source, prepare_rows, template_hash, use_template
from jeagle.data.chat.templates import ChatTemplate
from jeagle.data.preparation import is_same_model
from jeagle.data.sources import conversations
from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.run import dataset
from tests import tiny
from tests.data.chats import ANSWER, CHATS, TOOL, TOOL_CHAT, USER, end_ids, make_tokenizer, tokenizer_for
from tests.data.helpers import read_conversations, render, split_held_out


@pytest.fixture
def tokenizer():
    return tokenizer_for("chatml")


def make(tmp_path, rows, tokenizer, *, target="", **settings):
    """Prepares rows in a folder of their own; returns (statistics, folder)."""
    source, folder = tmp_path / "rows.jsonl", tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**{"row_length": 64, "held_out": 0.0} | settings)
    ends, vocab = end_ids(tokenizer), len(tokenizer)
    parts = parse_source(str(source))
    return prepare_rows(parts, tokenizer, config, folder, end_token_ids=ends, vocab=vocab, target=target), folder


def chats(count, words=4):
    return [{"prompt": f"the cat {i}", "response": " ".join(["mat"] * words)} for i in range(count)]


def prepare(flags):
    return dataset.prepare(configs.parse_overrides(RunConfig(name="t"), flags, program="t", description=""))


# T1: nothing is learnt, and the run ends well.
def test_prompts_that_fill_the_row_stop_the_preparation(tmp_path, tokenizer):
    rows = [{"prompt": f"{i} " + "the cat sat " * 60, "response": "mat"} for i in range(20)]
    with pytest.raises(UserError, match=r"20 of 20 conversations have no answer within --data.row-length 64 .95 % are"):
        make(tmp_path, rows, tokenizer)
    statistics, _ = make(tmp_path, rows, tokenizer, long="split")
    assert statistics["train"]["split"] == 20 and statistics["train"]["supervised_tokens"] > 20


# T2: the first answer token is never trained, the last slot is padding.
@pytest.mark.parametrize("step", range(4))
def test_the_exact_slots_of_a_row_of_twelve(step):
    """3 tokens of prompt, 5 of answer, 4 of padding: slot t of step k reads token t+k and is judged by token t+k+1."""
    real, learnt = np.arange(12) < 8, (np.arange(12) >= 3) & (np.arange(12) < 8)
    row = Batch(
        np.where(real, np.arange(12), 0)[None].astype(np.int32),
        real[None].astype(np.int32),
        np.where(real, np.arange(12), 0)[None].astype(np.int32),
        learnt[None],
    )
    counts = align.counting_slots(row, 4, "predicted", xp=np)[step, 0]
    reads = align.read_positions(row.segments_BT, 4, xp=np)[step, 0]
    judged = {int(reads[t]) + 1 for t in np.flatnonzero(counts)}
    assert judged and judged <= set(np.flatnonzero(learnt).tolist())
    if step == 0:
        assert judged == set(np.flatnonzero(learnt).tolist())


def test_the_first_token_and_the_end_token_of_an_answer_are_supervised(tokenizer):
    found = render(tokenizer, CHATS["single"], end_token_ids=end_ids(tokenizer))
    learnt = found.ids[found.supervised]
    assert tokenizer.decode(learnt[:1]).startswith("s") and learnt[-1] == tokenizer.eos_token_id


# T3: the template of training is another than the engine's.
def test_ids_that_differ_from_apply_chat_template_are_refused(tokenizer, monkeypatch):
    good = ChatTemplate.ids
    monkeypatch.setattr(ChatTemplate, "ids", lambda *args: [*good(*args)[:7], 0, *good(*args)[8:]])
    with pytest.raises(ConversationError, match="at token 7"):
        render(tokenizer, CHATS["single"], end_token_ids=end_ids(tokenizer), check_ids=True)


def test_another_template_prepares_the_rows_again(tmp_path, capsys):
    flags = tiny.flags(tmp_path)
    first = prepare(flags)
    assert not prepare([*flags, "--data.template", "chatml"]).reused
    assert "the chat template was" in capsys.readouterr().out and first.data.is_dir()
    assert template_hash(tokenizer_for("chatml")) != template_hash(tokenizer_for("qwen"))


# T4: answers that were cut off count as complete.
def test_end_tokens_of_answers_that_were_cut_off_are_not_supervised(tmp_path, tokenizer):
    rows = [row | {"finish_reason": "length" if i % 3 == 0 else "stop"} for i, row in enumerate(chats(30))]
    statistics, folder = make(tmp_path, rows, tokenizer)
    assert statistics["answers_cut_short"] == 10
    found = load_rows(folder / "train")
    learnt = np.asarray(found.tokens_BT)[np.asarray(found.supervised_BT)]
    assert (learnt == tokenizer.eos_token_id).sum() == 20


# T5: reasoning left out of the mask, or an empty block trained.
def test_an_empty_reasoning_block_is_never_supervised():
    tokenizer = tokenizer_for("qwen3-thinking")
    ends = end_ids(tokenizer)
    with pytest.raises(ConversationError, match="empty reasoning block.*--data.thinking off"):
        render(tokenizer, CHATS["single"], end_token_ids=ends, thinking="on")
    found = render(tokenizer, CHATS["single"], end_token_ids=ends)
    assert "think" in tokenizer.decode(found.ids) and "think" not in tokenizer.decode(found.ids[found.supervised])


# T6: history by another model.
def test_the_share_of_the_targets_own_answers_is_counted(tmp_path, tokenizer):
    rows = [row | {"model": "Owner/Target-1B" if i < 5 else "other"} for i, row in enumerate(chats(20))]
    statistics, _ = make(tmp_path, rows, tokenizer, target="owner/target-1b")
    assert (statistics["on_policy"], statistics["known_model"], statistics["conversations"]) == (5, 20, 20)
    assert is_same_model("pypi:llm-x", "pypi:llm-x==1.2")
    assert not is_same_model("", "x") and not is_same_model("x", "") and not is_same_model("a/x2", "b/x")
    described = dict(statistics, coverage_train=1, coverage_held_out=1, draft_vocab=1, tokens_seen=1, ends_left_out=[])
    described["template_reads_date"] = False
    assert any("25% of the answers are known" in line for line in dataset.room.describe_statistics(described, tmp_path))


# T7: bos doubled or missing.
def test_a_doubled_bos_token_is_refused():
    tokenizer = make_tokenizer("byte_bpe", "<|im_end|>", "<s>")
    use_template(tokenizer, "chatml")
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + tokenizer.chat_template
    with pytest.raises(ConversationError, match="bos token twice"):
        render(tokenizer, CHATS["single"], end_token_ids=end_ids(tokenizer))


def test_a_tokenizer_that_adds_bos_by_itself_does_not_double_the_templates():
    from tokenizers import processors

    tokenizer = make_tokenizer(
        "byte_bpe", "<|eot_id|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>")
    )
    use_template(tokenizer, "llama3")
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    found = render(tokenizer, CHATS["multi"], end_token_ids=end_ids(tokenizer), check_ids=True)
    assert found.ids.tolist().count(tokenizer.bos_token_id) == 1


# T8: tool rows crash or lose fields.
@pytest.mark.parametrize("template", ["qwen", "llama3.1", "mistral"])
def test_tool_rows_of_every_form_keep_their_calls(tmp_path, template):
    tokenizer = tokenizer_for(template)
    text = json.loads(json.dumps(TOOL_CHAT))
    text[1]["content"], function = None, text[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    for messages in (TOOL_CHAT, text):
        statistics, folder = make(tmp_path, [{"messages": messages, "tools": [TOOL]}], tokenizer, row_length=2048)
        rows = load_rows(folder / "train")
        learnt = tokenizer.decode(np.asarray(rows.tokens_BT)[np.asarray(rows.supervised_BT)])
        assert statistics["rejected"] == {} and '"city": "Paris"' in learnt and "18 degrees there" in learnt
        assert learnt.count("18 degrees") == 1  # the tool's own is read, not learnt


# T9: one row kills the work, or junk is trained.
def test_a_row_that_the_template_refuses_is_rejected_with_its_place(tmp_path):
    tokenizer = tokenizer_for("gemma")
    rows = [{"messages": [USER | {"content": f"the cat {i}"}, ANSWER]} for i in range(199)]
    rows.insert(7, {"messages": [USER, USER, ANSWER]})
    statistics, folder = make(tmp_path, rows, tokenizer)
    [(reason, count)] = statistics["rejected"].items()
    assert "Gemma wants turns" in reason and count == 1 and statistics["train"]["documents"] == 199
    [line] = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert line == {"where": f"{tmp_path}/rows.jsonl:8", "reason": reason}
    with pytest.raises(UserError, match=r"40 of 239.*Gemma wants.*rows.jsonl:8"):
        make(
            tmp_path,
            [*rows, *[{"messages": [USER | {"content": f"{i}"}] * 2 + [ANSWER]} for i in range(39)]],
            tokenizer,
        )


def test_a_template_that_refuses_everything_stops_the_preparation_early(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "FIRST_ROWS", 300)
    tokenizer = make_tokenizer("byte_bpe", "<|im_end|>")
    tokenizer.chat_template = "{{ raise_exception('no system role, please') }}"
    with pytest.raises(
        UserError,
        match=r"None of the first 300 .* refuses it: no system role, please \(300 times, first .*rows.jsonl:1",
    ):
        make(tmp_path, chats(3000), tokenizer)
    assert (tmp_path / "data" / "rejected.jsonl").read_text().count("\n") == 300
    tokenizer.chat_template = "{% if messages[0].content.endswith(' 9') %}" + tokenizer_for("chatml").chat_template
    tokenizer.chat_template += "{% else %}{{ raise_exception('not this one') }}{% endif %}"
    with pytest.raises(UserError, match="999 of 1000 conversations cannot be used"):  # one could: it reads to the end
        make(tmp_path, chats(1000), tokenizer)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_training_and_held_out_prompts_are_disjoint_for_every_share(tmp_path, share):
    path = tiny.write_chats(tmp_path / "chats.jsonl", 200)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for row in found[:]:  # each prompt has two answers
        again = [m | {"content": m["content"] + " too"} if m["role"] == "assistant" else m for m in row["messages"]]
        found.append({"messages": again})
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    training, held_out = split_held_out(read_conversations(str(path)).conversations, share)
    assert len(training) + len(held_out) > 380
    prompts = [
        {tuple(m["content"] for m in c.messages if m["role"] == "user") for c in side} for side in (training, held_out)
    ]
    assert not prompts[0] & prompts[1]


def test_the_preparation_stops_if_nothing_remains_to_train_on(tmp_path, tokenizer):
    with pytest.raises(UserError, match="All 3 conversations are held out.*lower --data.held-out from 0.999"):
        make(tmp_path, chats(3), tokenizer, held_out=0.999)
