"""The tokenizer of a GGUF gives llama.cpp's ids, and the tokens that end an answer are those of its chat template."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from jeagle.errors import UserError
from jeagle.targets import TargetFiles, end_token_ids, load_tokenizer
from jeagle.targets.tokenizers.load import chat_turn_end

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "smollm2_tokenizer.json").read_text())
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"


@pytest.fixture(scope="session")
def smollm2(smollm2_files: TargetFiles):
    return load_tokenizer(smollm2_files)


@pytest.mark.parametrize("entry", GOLDEN["strings"], ids=lambda e: ascii(e["text"][:20]))
def test_ids_are_llama_cpps(entry: dict, smollm2):
    assert smollm2(entry["text"]).input_ids == entry["ids"]


@pytest.mark.parametrize("entry", GOLDEN["strings"], ids=lambda e: ascii(e["text"][:20]))
def test_ids_decode_to_the_text(entry: dict, smollm2):
    assert smollm2.decode(entry["ids"]) == entry["text"]


@pytest.mark.parametrize("chat", GOLDEN["chats"])
def test_chats(chat: dict, smollm2):
    options = {"add_generation_prompt": chat["generation_prompt"]}
    assert smollm2.apply_chat_template(chat["messages"], tokenize=False, **options) == chat["text"]
    ids = smollm2.apply_chat_template(chat["messages"], tokenize=True, return_dict=False, **options)
    assert ids == chat["ids"]


def test_special_tokens(smollm2):
    assert {name: getattr(smollm2, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")} == GOLDEN["special"]
    assert len(smollm2) == 49152
    assert smollm2.decode(smollm2("<|im_start|>hi<|im_end|>").input_ids, skip_special_tokens=True) == "hi"
    assert end_token_ids(smollm2, {"eos_token_id": 2}) == (2,)
    assert end_token_ids(smollm2, {"eos_token_id": [0, 2]}) == (0, 2)


def tiny_gguf(path: Path, *, pre: str = "smollm", model: str = "gpt2", bos: bool = False) -> TargetFiles:
    """A tokenizer of bytes and two merges, with a template whose end of turn is not its end of text."""
    writer = gguf.GGUFWriter(path, "llama")
    specials = ["<|bos|>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokens = [*specials, "<think>", *"abcdef\u0120\u010a0123456789<|>?'", "ab", "\u0120ab"]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 5 + [4] + [1] * (len(tokens) - 6))
    writer.add_token_merges(["a b", "\u0120 ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TargetFiles(str(path), path, "gguf", "")


def test_end_of_turn_comes_from_the_template(tmp_path: Path):
    tokenizer = load_tokenizer(tiny_gguf(tmp_path / "t.gguf"))
    assert chat_turn_end(tokenizer) == 2
    assert end_token_ids(tokenizer, {"eos_token_id": None}) == (1, 2)
    tokenizer.chat_template = None
    assert end_token_ids(tokenizer, {}) == (1,)
    tokenizer.chat_template = "{{ raise_exception('only system turns') }}"
    assert end_token_ids(tokenizer, {}) == (1,)


def test_user_defined_tokens_stay_whole_and_are_not_special(tmp_path: Path):
    tokenizer = load_tokenizer(tiny_gguf(tmp_path / "t.gguf"))
    ids = tokenizer("a<think>b<|end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<think>", "b", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


def test_bos_comes_first_only_where_the_file_says_so(tmp_path: Path):
    for bos in (False, True):
        tokenizer = load_tokenizer(tiny_gguf(tmp_path / f"{bos}.gguf", bos=bos))
        assert tokenizer.convert_ids_to_tokens(tokenizer("ab ab").input_ids) == ["<|bos|>"] * bos + ["ab", "\u0120ab"]
        assert tokenizer.convert_ids_to_tokens(tokenizer("ab", add_special_tokens=False).input_ids) == ["ab"]


@pytest.mark.parametrize("kind", [{"pre": "kimi-k2"}, {"model": "bert"}])
def test_unknown_kinds_are_named(kind: dict, tmp_path: Path):
    with pytest.raises(UserError, match=next(iter(kind.values()))):
        load_tokenizer(tiny_gguf(tmp_path / "t.gguf", **kind))


def test_a_tokenizer_beside_the_gguf_wins(tmp_path: Path):
    load_tokenizer(tiny_gguf(tmp_path / "known.gguf")).save_pretrained(tmp_path / "other")
    unknown = tiny_gguf(tmp_path / "other" / "unknown.gguf", pre="kimi-k2")
    assert (
        load_tokenizer(unknown)("ab<|end|>").input_ids
        == load_tokenizer(tiny_gguf(tmp_path / "k.gguf"))("ab<|end|>").input_ids
    )


def test_safetensors_folder(tmp_path: Path):
    files = TargetFiles(str(tmp_path), tmp_path, "safetensors", "")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(files)
    original = load_tokenizer(tiny_gguf(tmp_path / "t.gguf"))
    original.save_pretrained(tmp_path)
    again = load_tokenizer(files)
    assert again("ab 12<|end|>").input_ids == original("ab 12<|end|>").input_ids
    assert again.chat_template == TEMPLATE


def test_importing_is_quick_and_needs_no_torch():
    heavy = {"torch", "transformers", "gguf"}
    program = f"import sys, jeagle.targets.tokenizers.load; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
