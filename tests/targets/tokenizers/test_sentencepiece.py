"""Folders that have only a tokenizer.model give sentencepiece's own ids."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from jeagle.errors import UserError
from jeagle.targets import TargetFiles, end_token_ids, load_tokenizer
from tests.goldens.make_gguf_tokenizers import STRINGS

CORPUS = [Path(__file__).read_text(), (Path(__file__).parents[1] / "gguf" / "test_reader.py").read_text(), *STRINGS]
RANDOM = random.Random(0)
# Without what the tokenizers library does otherwise: it looks for added tokens first, so that no space comes before one
# that starts a text, and its normaliser takes "\r\n" for one letter.
TEXTS = [" " + text.replace("<|end|>", "<sep>") for text in STRINGS if "\r\n" not in text]
TEXTS += [" ", "   ", "\u2581x", "a<sep>b <sep> c", "trailing  ", "tab\tx\n  y", "    indented", "\x00", "1 22 333"]
TEXTS += ["".join(RANDOM.choices("ab \n\t<>0x41é世🙂_-.", k=RANDOM.randint(1, 40))) for _ in range(300)]
# How Llama's, Gemma's and (by sentencepiece's defaults) T5's were trained.
LLAMA = {"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "user_defined_symbols": ["<sep>"]}
GEMMA = LLAMA | {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "\u2581\u2581", "\u2581\u2581\u2581"]}
PLAIN: dict[str, Any] = {}


def trained(**options: Any) -> bytes:
    written = io.BytesIO()
    lines = [line.replace("\t", " ") for text in CORPUS for line in text.split("\n") if line]
    options = {"vocab_size": 700, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **options)
    return written.getvalue()


def folder_with(folder: Path, model: bytes, **config: Any):
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False} | config))
    return load_tokenizer(TargetFiles(str(folder), folder, "safetensors", ""))


@pytest.mark.parametrize("how", [LLAMA, GEMMA, PLAIN], ids=["llama", "gemma", "plain"])
def test_bpe_ids_are_sentencepieces(how: dict[str, Any], tmp_path: Path):
    model = trained(model_type="bpe", **how)
    ours, theirs = folder_with(tmp_path, model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(ours) == theirs.get_piece_size()
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours(text).input_ids == ids, text
        if how is not PLAIN:  # which writes " ⁇ " for a letter that it does not know
            assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("how", [LLAMA, PLAIN], ids=["llama", "plain"])
def test_unigram_ids_are_sentencepieces_or_as_likely(how: dict[str, Any], tmp_path: Path):
    """Of two ways of equal likelihood either may be taken: both sum floats, each in its own precision."""
    model = trained(model_type="unigram", **how)
    ours, theirs = folder_with(tmp_path, model), sentencepiece.SentencePieceProcessor(model_proto=model)
    differing = 0
    for text in TEXTS:
        found, expected = ours(text).input_ids, theirs.encode(text)
        differing += found != expected
        assert sum(map(theirs.get_score, found)) == pytest.approx(sum(map(theirs.get_score, expected)), abs=1e-3), text
    assert differing < len(TEXTS) / 50


def test_a_bytes_name_in_a_text_is_not_that_byte(tmp_path: Path):
    for kind in ("bpe", "unigram"):
        ours = folder_with(tmp_path, trained(model_type=kind, **LLAMA))
        assert ours.decode(ours("<0x41> <0x0A>").input_ids) == "<0x41> <0x0A>"


def test_letters_that_are_only_part_of_pieces(tmp_path: Path):
    """As in Gemma's first vocabulary, which has two tabs as a piece, but not one."""
    model = sentencepiece_model_pb2.ModelProto.FromString(trained(model_type="bpe", **LLAMA))
    assert "\t" not in {piece.piece for piece in model.pieces}
    model.pieces[-1].piece = "\t\t"
    written = model.SerializeToString()
    ours, theirs = folder_with(tmp_path, written), sentencepiece.SentencePieceProcessor(model_proto=written)
    for text in ("\t", "\t\t", "a\t\t\tb", "\t\t\t\tx"):
        assert ours(text).input_ids == theirs.encode(text), text
    assert theirs.encode("\t\t")[-1] == len(model.pieces) - 1


ADDED = {
    "3": {"content": "<sep>", "special": False},
    "700": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
    "701": {"content": "<tool>", "special": False},
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


def test_a_whole_folder(tmp_path: Path):
    model = trained(model_type="bpe", hard_vocab_limit=True, **LLAMA)
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|im_end|>"}
    tokenizer = folder_with(tmp_path, model, add_bos_token=True, added_tokens_decoder=ADDED, **names)
    assert len(tokenizer) == 702
    assert [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")] == [1, 2, 0, 700]
    ids = tokenizer("a<|im_end|>b<tool>").input_ids
    assert ids[0] == 1 and ids[-1] == 701 and 700 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>"
    assert tokenizer.chat_template is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(TargetFiles("", tmp_path, "safetensors", ""))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>Hi<|im_end|>Hello<|im_end|>"
    assert end_token_ids(tokenizer, {}) == (2, 700)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(TargetFiles("", tmp_path / "saved", "safetensors", ""))
    assert all(again(text).input_ids == tokenizer(text).input_ids for text in TEXTS)


def test_templates_by_name_and_where_the_first_space_goes(tmp_path: Path):
    model = trained(model_type="bpe", **LLAMA)
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]
    tokenizer = folder_with(tmp_path, model, chat_template=templates)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi<|im_end|>"

    def pieces(**config: Any) -> str:
        tokenizer = folder_with(tmp_path, model, **config)
        return "".join(tokenizer.convert_ids_to_tokens(tokenizer("a<s>a").input_ids))

    assert pieces() == "\u2581a<s>a"
    assert pieces(legacy=True) == "\u2581a<s>\u2581a"
    assert pieces(add_prefix_space=False) == "a<s>a"


def test_folders_that_cannot_be_used(tmp_path: Path):
    files = TargetFiles("", tmp_path, "safetensors", "")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer .neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(files)
    for content in (b"not a model at all", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="is not a sentencepiece model"):
            load_tokenizer(files)
    for kind in ("char", "word"):
        with pytest.raises(UserError, match=rf"kind that is supported \({kind}\)"):
            folder_with(tmp_path, trained(model_type=kind, vocab_size=200 if kind == "char" else 700))
    with pytest.raises(UserError, match=r"adds the token <x> as 9999, but no token has the id \d+"):
        folder_with(tmp_path, trained(model_type="bpe"), added_tokens_decoder={"9999": {"content": "<x>"}})


def test_tokens_without_an_embedding_are_refused(tmp_path: Path):
    model = trained(model_type="bpe", hard_vocab_limit=True, **LLAMA)
    (tmp_path / "config.json").write_text('{"vocab_size": 700}')
    folder_with(tmp_path, model)
    image = {"700": {"content": "<image>", "special": True}}
    folder_with(tmp_path, model, added_tokens_decoder=image)  # as in Gemma 3's text models
    with pytest.raises(UserError, match=r"has 701 tokens, but the target embeds only 700 \('<image>' is the first"):
        folder_with(tmp_path, model, added_tokens_decoder=image, pad_token="<image>")
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 600}}')
    with pytest.raises(UserError, match="has 700 tokens, but the target embeds only 600"):
        folder_with(tmp_path, model)
