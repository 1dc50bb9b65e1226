"""Tokenizers built from GGUF metadata give llama.cpp's ids, for every pre-tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jeagle.targets import TargetFiles, load_tokenizer
from jeagle.targets.gguf.tokenizer import PRE_TOKENIZERS
from tests.goldens.make_gguf_tokenizers import HERE, STRINGS, cases, write

GOLDEN = json.loads((HERE / "tokenizers.json").read_text())
# Where llama.cpp's rewriting of an expression is coarser than the models' own tokenizer.json, which is followed here:
# it takes accents for no part of a word, and cuts at wide spaces that lie within DeepSeek's range of scripts.
COARSER = {
    **dict.fromkeys(("gpt2 gpt-4o", "gpt2 llama4", "gpt2 tekken"), ("مرحبا", "combining")),
    **dict.fromkeys(("gpt2 deepseek-coder", "gpt2 deepseek-llm"), ("\u00a0non",)),
}


def load(name: str, folder: Path):
    options = dict(cases())[name]
    path = write(folder / "t.gguf", vocabulary=GOLDEN[options["model"]], **options)
    return load_tokenizer(TargetFiles(name, path, "gguf", ""))


def test_goldens_cover_every_pre_tokenizer():
    assert {f"gpt2 {pre}" for pre in PRE_TOKENIZERS} <= set(GOLDEN["ids"]) == set(dict(cases()))


@pytest.mark.parametrize("name", GOLDEN["ids"])
def test_ids_are_llama_cpps_and_decode_to_the_text(name: str, tmp_path: Path):
    tokenizer = load(name, tmp_path)
    for text, expected in zip(STRINGS, GOLDEN["ids"][name], strict=True):
        ids = tokenizer(text).input_ids if text else []
        if not text.startswith(COARSER.get(name, ("\0",))):
            assert ids == expected, text
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert plain == (ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids)
        if "<|end|>" not in text:  # a space follows it, which the text may not have
            assert tokenizer.decode(plain) == text


def test_bos_and_eos_are_added(tmp_path: Path):
    path = write(tmp_path / "t.gguf", "gpt2", GOLDEN["gpt2"], "qwen2", add_eos_token=True, add_bos_token=True)
    tokenizer = load_tokenizer(TargetFiles("", path, "gguf", ""))
    ids = tokenizer("hi").input_ids
    assert (ids[0], ids[-1]) == (0, 1) and tokenizer.decode(ids, skip_special_tokens=True) == "hi"
    assert tokenizer("hi", add_special_tokens=False).input_ids == ids[1:-1]


def test_gemma4_tokenizer(tmp_path: Path):
    """Merges over the text itself, spaces as sentencepiece writes them, bytes for what has no token."""
    letters = [*"abc", "\u2581", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = ["a b", "\u2581 ab", "\n \n", "\u2581 \u2581"]
    tokens = ["<bos>", "<eos>", *letters, "ab", "\u2581ab", "\n\n", "\u2581\u2581"]
    types = [3, 3, *(1 for _ in "abc"), 1, 1, *(6 for _ in range(256)), 1, 1, 1, 1]
    vocabulary = {"tokens": tokens, "types": types, "merges": merges}
    path = write(tmp_path / "t.gguf", "gemma4", vocabulary, add_bos_token=True)
    tokenizer = load_tokenizer(TargetFiles("", path, "gguf", ""))
    ids = tokenizer("ab ab  c\n\né<eos>").input_ids
    expected = ["ab", "\u2581ab", "\u2581\u2581", "c", "\n\n", "<0xC3>", "<0xA9>", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab  c\n\né"
