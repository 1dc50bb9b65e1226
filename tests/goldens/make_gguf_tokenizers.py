"""Makes gguf/tokenizers.json: the ids that llama.cpp gives texts, by every kind of tokenizer that is read from GGUF.

The vocabularies are small ones, trained here on the texts themselves with nothing to keep merges from crossing words: a
text that is cut elsewhere gets other ids. They are recorded too. llama.cpp comes through the package cyllama.

Run it from the repository's root, in the environment of make_smollm2.py with sentencepiece and tokenizers beside it:

    goldens_env/bin/python -m tests.goldens.make_gguf_tokenizers
"""

# ruff: noqa: RUF001  the strings are in many scripts on purpose

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HERE = Path(__file__).parent / "gguf"
STRINGS = [
    "",
    "Hello, world! Hello World HELLO",
    " leading and trailing ",
    "a  b   c    d",
    "\n\n\ttabs\tand\nnewlines\r\n\r\n  mixed \n x\n",
    "1234567890 12 345 6789",
    "In 1999, 3.14159 cost $42 or 10%; version 2.0.13-rc1, 0x7fff, 1e-5",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\n    pass",
    'for (int i = 0; i < 10; ++i) { a[i] += b[i]; }\n{"key": [1, 2, null], "s": "\\u00e9"}',
    "don't can't I'll we've they'd it's I'm you're DON'T I'LL WE'VE X'S",
    "naïve café résumé Ünïcödé camelCase PascalCaseXML ǅabc ªº",
    "日本語のテキスト、中文文本。한국어 1日 ー・",
    "Привет, мир! Γειά σου Ⴀა ქართული ԱԲ հայ",
    "مرحبا بالعالم شكرًا שלום עֲלֵיכֶם हिन्दी भाषा ไทย",
    "🙂👍🏽 family: 👨‍👩‍👧‍👦 flag: 🇩🇪 𝐀𝐛 𐐀",
    "combining: e\u0301 a\u0308b \u200b zero width \ufeff",
    "½ ² ٣ ৪ Ⅷ ① x² H₂O",
    "<|end|>x <|end|> \n<|end|>\n<think>a</think> <thi",
    "\u00a0non\u2003breaking\u3000spaces\x07",
    "https://example.org/a_b?c=d&e=%20f#g //path/to C:\\x\\y",
    "A" * 20 + "!" * 10 + "-" * 10 + " " * 17 + "z" + "...\n\n/// ///",
]
PRES = [
    *("chatglm-bpe", "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3"),
    *("falcon3", "glm4", "gpt-2", "gpt-4o", "llama-bpe", "llama-v3", "llama3", "llama4", "mpt", "olmo", "phi-2"),
    *("pixtral", "qwen2", "qwen35", "refact", "smaug-bpe", "smollm", "stablelm2", "starcoder", "tekken"),
]
BYTE_LEVEL_SPECIALS = {"<|bos|>": 3, "<|end|>": 3, "<think>": 4}


def byte_level_vocabulary() -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    texts = [text.replace("<|end|>", "").replace("<think>", "") for text in STRINGS]  # no token twice
    tokenizer.train_from_iterator(texts * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*BYTE_LEVEL_SPECIALS, *sorted(model["vocab"], key=model["vocab"].get)]
    types = [*BYTE_LEVEL_SPECIALS.values(), *(1 for _ in model["vocab"])]
    return {"tokens": tokens, "types": types, "merges": [" ".join(merge) for merge in model["merges"]]}


def sentencepiece_vocabulary() -> dict[str, Any]:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STRINGS * 2),
        model_writer=written,
        vocab_size=560,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        user_defined_symbols=["<think>"],
        control_symbols=["<|end|>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    texts = [piece.piece for piece in model.pieces]
    return {"tokens": texts, "scores": [p.score for p in model.pieces], "types": [p.type for p in model.pieces]}


def write(path: Path, model: str, vocabulary: dict[str, Any], pre: str = "default", **flags: bool) -> Path:
    """A GGUF of a tokenizer, and of the smallest model that llama.cpp takes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    sizes = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "attention.head_count": 2}
    for key, size in (sizes | {"context_length": 64}).items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary["tokens"]), 8), np.float32))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(8, np.float32))
    for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{matrix}.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Name -> how `write` is called, the vocabulary left out."""
    found = [(f"gpt2 {pre}", {"model": "gpt2", "pre": pre}) for pre in PRES]
    found += [("gpt2 qwen2 with bos", {"model": "gpt2", "pre": "qwen2", "add_bos_token": True})]
    found += [("llama", {"model": "llama"}), ("llama without space", {"model": "llama", "add_space_prefix": False})]
    return found


def _ids(path: Path) -> list[list[int]]:
    import cyllama.llama.llama_cpp as llama_cpp

    model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams())  # must outlive its vocabulary
    vocab = model.get_vocab()
    return [list(vocab.tokenize(text, True, True)) if text else [] for text in STRINGS]


def main() -> None:
    import cyllama.llama.llama_cpp as llama_cpp

    llama_cpp.ggml_backend_load_all()
    golden: dict[str, Any] = {"gpt2": byte_level_vocabulary(), "llama": sentencepiece_vocabulary(), "ids": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in cases():
            path = write(Path(folder) / "t.gguf", vocabulary=golden[options["model"]], **options)
            golden["ids"][name] = _ids(path)
            print(name, sum(map(len, golden["ids"][name])), file=sys.stderr)
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":")).replace("]],", "]],\n")
    (HERE / "tokenizers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
