"""Known ways in which training data goes wrong in silence: each fault is planted, and is seen."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jeagle import align, dataset
from jeagle import config as configs
from jeagle.data import (
    ConversationError,
    Rules,
    Shape,
    build,
    choose,
    conversations,
    given_map,
    load_rows,
    load_tables,
    parse_source,
    read_conversations,
    render,
    save_tables,
    split_held_out,
    template_hash,
    use_template,
)
from jeagle.data.build import is_of
from jeagle.errors import UserError
from jeagle.joints import Batch
from tests import tiny
from tests.data.chats import ANSWER, CHATS, TOOL, TOOL_CHAT, USER, end_ids, make_tokenizer, tokenizer_for


@pytest.fixture
def tokenizer():
    return tokenizer_for("chatml")


def make(tmp_path, rows, tokenizer, *, rules=(), **shape):
    """build() on rows, in a folder of its own -> (statistics, folder)."""
    source, folder = tmp_path / "rows.jsonl", tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"row_length": 64, "vocab": len(tokenizer)} | shape
    made = Rules(end_ids(tokenizer), **dict(rules))
    return build(parse_source(str(source)), tokenizer, made, Shape(**settings), folder), folder


def chats(count, words=4):
    return [{"prompt": f"the cat {i}", "response": " ".join(["mat"] * words)} for i in range(count)]


# T1: nothing is learnt, and the run ends well.
def test_prompts_that_fill_the_row_stop_the_work(tmp_path, tokenizer):
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


def test_the_first_token_and_the_end_token_of_an_answer_are_learnt(tokenizer):
    found = render(tokenizer, CHATS["single"], end_token_ids=end_ids(tokenizer))
    learnt = found.ids[found.supervised]
    assert tokenizer.decode(learnt[:1]).startswith("s") and learnt[-1] == tokenizer.eos_token_id


# T3: the template of training is another than the engine's.
def test_ids_that_are_not_apply_chat_templates_are_refused(tokenizer, monkeypatch):
    from jeagle.data.texts import TextMaker

    good = TextMaker.ids
    monkeypatch.setattr(TextMaker, "ids", lambda *args: [*good(*args)[:7], 0, *good(*args)[8:]])
    with pytest.raises(ConversationError, match="at token 7"):
        render(tokenizer, CHATS["single"], end_token_ids=end_ids(tokenizer), check_ids=True)


def test_another_template_is_another_cache(tmp_path, capsys):
    flags = tiny.flags(tmp_path)
    first = prepare(flags)
    assert not prepare([*flags, "--data.template", "chatml"]).reused
    assert "template changed" in capsys.readouterr().out and first.data.is_dir()
    assert template_hash(tokenizer_for("chatml")) != template_hash(tokenizer_for("qwen"))


# T4: answers that were cut off count as complete.
def test_an_answer_that_was_cut_off_does_not_teach_its_end(tmp_path, tokenizer):
    rows = [row | {"finish_reason": "length" if i % 3 == 0 else "stop"} for i, row in enumerate(chats(30))]
    statistics, folder = make(tmp_path, rows, tokenizer)
    assert statistics["answers_cut_short"] == 10
    found = load_rows(folder / "train")
    learnt = np.asarray(found.tokens_BT)[np.asarray(found.supervised_BT)]
    assert (learnt == tokenizer.eos_token_id).sum() == 20


# T5: reasoning left out of the mask, or an empty block trained.
def test_an_empty_reasoning_block_is_never_trained():
    tokenizer = tokenizer_for("qwen3-thinking")
    ends = end_ids(tokenizer)
    with pytest.raises(ConversationError, match="empty reasoning block.*--data.thinking off"):
        render(tokenizer, CHATS["single"], end_token_ids=ends, thinking="on")
    found = render(tokenizer, CHATS["single"], end_token_ids=ends)
    assert "think" in tokenizer.decode(found.ids) and "think" not in tokenizer.decode(found.ids[found.supervised])


# T9 too: what is measured stands, a word changed, among what is learnt.
def test_held_out_copies_of_training_prompts_are_told(tmp_path, tokenizer):
    random = np.random.default_rng(0)
    rows = []
    for i in range(200):
        words = random.choice(["the", "cat", "sat", "mat", "bird", "tree", "stone", "green"], 90).tolist()
        rows += [{"prompt": " ".join(words[:40]) + mark, "response": " ".join(words[40:])} for mark in ("", f" {i}")]
    statistics, _ = make(tmp_path, rows, tokenizer, row_length=1024, held_out=0.2)
    assert 190 <= statistics["near_duplicates"] <= 210 and 40 <= statistics["near_held_out"] <= 90
    described = dict(statistics, coverage_train=1, coverage_held_out=1, draft_vocab=1, tokens_seen=1, ends_left_out=[])
    described["template_reads_date"] = False
    assert any("flatters the draft" in line for line in dataset.room.describe(described, tmp_path))


def test_near_copies_are_left_out_and_a_system_prompt_that_all_share_makes_none(tmp_path, tokenizer):
    """A conversation stays and its near copies go, whichever side of the split they are on; so that nothing leaks."""
    random, system = np.random.default_rng(0), {"role": "system", "content": "the old stone house near a tree " * 40}
    names, said = ["the", "cat", "sat", "mat", "bird", "tree", "stone", "green"], []
    for i in range(60):
        question, answer = (" ".join(random.choice(names, n)) for n in (40, 60))
        for mark in ("", " now", " then")[: 1 + i % 3]:
            turns = [{"role": "user", "content": question + mark}, {"role": "assistant", "content": answer}]
            said.append({"messages": [system, *turns]})
    settings = {"row_length": 1024, "held_out": 0.3}
    kept, _ = make(tmp_path, said, tokenizer, **settings)
    assert kept["near_duplicates"] == 60 and kept["near_held_out"] > 10 and kept["conversations"] == 120
    statistics, folder = make(tmp_path, said, tokenizer, near_duplicates="drop", **settings)
    assert statistics["near_dropped"] == 60 and statistics["near_held_out"] == 0 and statistics["conversations"] == 60
    prompts = [json.loads(line)["messages"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert len(prompts) == statistics["held_out"]["documents"] == 60 - statistics["train"]["documents"]
    assert all(not m[1]["content"].endswith((" now", " then")) for m in prompts)


def test_a_first_turn_that_stands_in_the_system_prompt_too_makes_no_copies(tmp_path, tokenizer):
    random, system = np.random.default_rng(0), {"role": "system", "content": "this is the old stone house " * 40}
    rows = []
    for _ in range(30):
        answer = " ".join(random.choice(["the", "cat", "sat", "mat", "bird", "tree", "stone", "green"], 40))
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": [system, *turns]})
    assert make(tmp_path, rows, tokenizer, row_length=1024)[0]["near_duplicates"] == 0


# T6: history by another model.
def test_the_share_of_the_targets_own_answers_is_counted(tmp_path, tokenizer):
    rows = [row | {"model": "Owner/Target-1B" if i < 5 else "other"} for i, row in enumerate(chats(20))]
    statistics, _ = make(tmp_path, rows, tokenizer, target=("owner/target-1b",))
    assert (statistics["on_policy"], statistics["known_model"], statistics["conversations"]) == (5, 20, 20)
    assert is_of("pypi:llm-x", ("pypi:llm-x==1.2",)) and not is_of("", ("x",)) and not is_of("a/x2", ("b/x",))
    described = dict(statistics, coverage_train=1, coverage_held_out=1, draft_vocab=1, tokens_seen=1, ends_left_out=[])
    described["template_reads_date"] = False
    assert any("25% of the answers are known" in line for line in dataset.room.describe(described, tmp_path))


# T7: bos doubled or missing.
def test_a_bos_that_is_doubled_is_refused():
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
        assert statistics["set_aside"] == {} and '"city": "Paris"' in learnt and "18 degrees there" in learnt
        assert learnt.count("18 degrees") == 1  # the tool's own is read, not learnt


# T9: one row kills the work, or junk is trained.
def test_a_row_that_the_template_refuses_is_set_aside_with_its_place(tmp_path):
    tokenizer = tokenizer_for("gemma")
    rows = [{"messages": [USER | {"content": f"the cat {i}"}, ANSWER]} for i in range(199)]
    rows.insert(7, {"messages": [USER, USER, ANSWER]})
    statistics, folder = make(tmp_path, rows, tokenizer)
    [(reason, count)] = statistics["set_aside"].items()
    assert "Gemma wants turns" in reason and count == 1 and statistics["train"]["documents"] == 199
    [line] = map(json.loads, (folder / "set_aside.jsonl").read_text().splitlines())
    assert line == {"where": f"{tmp_path}/rows.jsonl:8", "reason": reason}
    with pytest.raises(UserError, match=r"40 of 239.*Gemma wants.*rows.jsonl:8"):
        make(
            tmp_path,
            [*rows, *[{"messages": [USER | {"content": f"{i}"}] * 2 + [ANSWER]} for i in range(39)]],
            tokenizer,
        )


def test_a_template_that_refuses_everything_is_told_after_the_first_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "FIRST", 300)
    tokenizer = make_tokenizer("byte_bpe", "<|im_end|>")
    tokenizer.chat_template = "{{ raise_exception('no system role, please') }}"
    with pytest.raises(
        UserError,
        match=r"None of the first 300 .* refuses it: no system role, please \(300 times, first .*rows.jsonl:1",
    ):
        make(tmp_path, chats(3000), tokenizer)
    assert (tmp_path / "data" / "set_aside.jsonl").read_text().count("\n") == 300
    tokenizer.chat_template = "{% if messages[0].content.endswith(' 9') %}" + tokenizer_for("chatml").chat_template
    tokenizer.chat_template += "{% else %}{{ raise_exception('not this one') }}{% endif %}"
    with pytest.raises(UserError, match="999 of 1000 conversations cannot be used"):  # one could: it reads to the end
        make(tmp_path, chats(1000), tokenizer)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_training_and_held_out_prompts_are_apart_for_every_share(tmp_path, share):
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


def test_nothing_left_to_train_on_stops_the_work(tmp_path, tokenizer):
    with pytest.raises(UserError, match="All 3 conversations are held out.*lower --data.held-out from 0.999"):
        make(tmp_path, chats(3), tokenizer, held_out=0.999)


# T14: a map is built anew under a trained head, or a stale one is found.
def prepare(flags):
    return dataset.prepare(configs.parse_overrides(configs.RunConfig(name="t"), flags, program="t", description=""))


def test_a_trained_drafts_vocabulary_does_not_change_under_it(tmp_path):
    flags = tiny.flags(tmp_path)
    before = load_tables(prepare(flags).tables)
    (tmp_path / "runs" / "tiny" / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(UserError, match="trained already.*draft_vocab differ"):
        prepare([*flags, "--draft.vocab", "50"])
    np.testing.assert_array_equal(load_tables(tmp_path / "runs" / "tiny" / "tables"), before)


def test_a_map_of_other_data_in_a_cache_is_refused(tmp_path):
    save_tables(tmp_path / "t", np.ones(8, np.int64), np.array([1, 2, 5]), {"data": "x", "draft_vocab": 3})
    with pytest.raises(UserError, match="made from other data .data differ"):
        load_tables(tmp_path / "t", {"data": "y", "draft_vocab": 3})


def test_a_map_that_was_put_in_anothers_place_is_refused(tmp_path):
    """By its path alone it would be taken: the manifest beside it is the old one."""
    for name, ids in (("mine", [1, 2, 5]), ("other", [1, 3, 6])):
        save_tables(tmp_path / name, np.ones(8, np.int64), np.array(ids), {"data": "x"})
    stale = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    for name in ("d2t.npy", "t2d.npy"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "mine" / name)
    with pytest.raises(UserError, match="not the one that its manifest names"):
        load_tables(tmp_path / "mine")
    with pytest.raises(UserError, match="made from other data .ids differ"):  # what a trained draft remembers
        load_tables(tmp_path / "other", stale)


def test_a_given_map_is_kept_whatever_the_data_say(tmp_path):
    flags = tiny.flags(tmp_path)
    ids = np.array([0, 1, *range(100, 198)])
    save_tables(tmp_path / "given", np.ones(319, np.int64), ids, {})
    vocab = json.loads((tmp_path / "target" / "config.json").read_text())["vocab_size"]
    mask = np.zeros(vocab, bool)
    mask[ids] = True
    np.save(tmp_path / "given" / "t2d.npy", mask)
    made = prepare([*flags, "--data.vocabulary", str(tmp_path / "given")])
    np.testing.assert_array_equal(load_tables(made.tables), ids)
    assert prepare([*flags, "--data.vocabulary", str(tmp_path / "given")]).reused
    with pytest.raises(UserError, match="has 100 tokens, but --draft.vocab is 90: make it 100"):
        prepare([*flags, "--draft.vocab", "90", "--data.vocabulary", str(tmp_path / "given")])


# T15, T16: absolute ids, zeros, a missing map.
@pytest.mark.parametrize(
    ("offsets", "mask", "said"),
    [
        ([1, 2, 5], [1, 2, 5], "holds offsets"),  # absolute ids
        ([1, 1, 3], [1, 2, 6], "contradict"),
        ([0, 0, 0], None, "all zeros"),
        ([3, 1, 0], None, "does not rise"),
        ([-2, 0, 0], None, "does not rise"),
        ([1.0, 1.0, 3.0], [1, 2, 5], "whole numbers"),
        ([1, 1, 7], [1, 2, 9], "names token 9, but the target has 8"),
    ],
)
def test_maps_that_name_other_tokens_are_refused(tmp_path, offsets, mask, said):
    np.save(tmp_path / "d2t.npy", np.array(offsets))
    if mask is not None:
        marked = np.zeros(max(8, max(mask) + 1), bool)
        marked[mask] = True
        np.save(tmp_path / "t2d.npy", marked)
    with pytest.raises(UserError, match=said):
        given_map(tmp_path, 3, 8, [])


def test_a_given_map_is_found_in_every_place_where_others_put_it(tmp_path):
    from safetensors.numpy import save_file

    ids, vocab = np.array([1, 2, 5]), 8
    offsets, mask = ids - np.arange(3), np.isin(np.arange(vocab), ids)
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own" / "d2t-3.npy", offsets)
    np.save(tmp_path / "own" / "t2d-3.npy", mask)
    (tmp_path / "draft").mkdir()
    save_file({"d2t": offsets, "t2d": mask}, tmp_path / "draft" / "model.safetensors")
    save_tables(tmp_path / "run" / "tables", np.ones(vocab, np.int64), ids, {})
    for place in ("own", "own/d2t-3.npy", "draft", "run"):
        np.testing.assert_array_equal(given_map(tmp_path / place, 3, vocab, [2]), ids)
    with pytest.raises(UserError, match="none of the end tokens 3"):
        given_map(tmp_path / "own", 3, vocab, [3])
    with pytest.raises(UserError, match="is nowhere"):
        given_map(tmp_path / "none", 3, vocab, [])


# T17: the draft cannot say the end, or has more slots than the data has tokens.
def test_every_end_token_is_in_the_vocabulary_and_spare_slots_are_filled():
    counts = np.zeros(50, np.int64)
    counts[[7, 9]] = 5
    ids = choose(counts, 10, [48, 49])
    assert {7, 9, 48, 49} <= set(ids.tolist()) and len(ids) == 10 and (np.diff(ids) > 0).all()


def test_low_coverage_is_told_with_its_numbers(tmp_path):
    lines = dataset.describe(prepare([*tiny.flags(tmp_path), "--draft.vocab", "5"]))
    [warning] = [line for line in lines if "cannot say" in line]
    assert warning.startswith("warning: ") and "raise --draft.vocab from 5" in warning and " tokens): " in warning
