"""Small tokenizers of each kind, and chats with system turns, tools and reasoning."""

# ruff: noqa: RUF001 (DeepSeek names its tokens with full-width bars)

from __future__ import annotations

import functools
from typing import Any

from jeagle.data import use_template

SPECIAL = {
    "chatml": ("<|im_end|>", None, ["<|im_start|>"]),
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"]),
    "gemma": ("<end_of_turn>", "<bos>", ["<start_of_turn>"]),
    "gpt-oss": (
        "<|return|>",
        None,
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"],
    ),
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "llama3.1": ("<|eot_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "llama4": ("<|eot|>", "<|begin_of_text|>", ["<|header_start|>", "<|header_end|>"]),
    "mistral": (
        "</s>",
        "<s>",
        [
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ],
    ),
    "phi": ("<|end|>", None, ["<|user|>", "<|assistant|>", "<|system|>"]),
    "phi4": ("<|im_end|>", None, ["<|im_start|>", "<|im_sep|>"]),
    "qwen": ("<|im_end|>", None, ["<|im_start|>"]),
    "qwen3-thinking": ("<|im_end|>", None, ["<|im_start|>"]),
    "vicuna": ("</s>", "<s>", []),
}
KINDS = ("byte_bpe", "unigram", "sentencepiece_bpe")
CORPUS = [
    "the cat sat on a mat and saw one red bird fly over many green trees near some old stone house",
    "What is the weather in Paris? It is 18 degrees there; I should look it up first.",
    'user assistant system {"city": "Paris"} naïve café 東京 🙂',
] * 8

USER = {"role": "user", "content": "the cat?"}
ANSWER = {"role": "assistant", "content": "sat on a mat"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "single": [USER, ANSWER],
    "multi": [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "saw one red bird"}],
    "system": [{"role": "system", "content": "be old"}, USER, ANSWER],
    "unicode": [{"role": "user", "content": "東京 🙂"}, {"role": "assistant", "content": "naïve café 🙂\n\n東京"}],
    "reasoning": [USER, ANSWER | {"reasoning_content": "a red bird"}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL_CHAT = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "18 degrees"},
    {"role": "assistant", "content": "It is 18 degrees there"},
]


@functools.lru_cache(maxsize=64)
def tokenizer_for(template: str, kind: str = "byte_bpe") -> Any:
    """A tokenizer that has the template's special tokens, and that template."""
    eos, bos, more = SPECIAL[template]
    tokenizer = make_tokenizer(kind, eos, bos, tuple(more))
    return use_template(tokenizer, template)


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    ids = {tokenizer.eos_token_id}
    known = tokenizer.get_vocab()
    return tuple(sorted(ids | {known[name] for name in ("<|call|>",) if name in known}))


def make_tokenizer(kind: str, eos: str, bos: str | None = None, more: tuple[str, ...] = ()) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = [*dict.fromkeys(name for name in (eos, bos, *more) if name)]
    special = [AddedToken(name, special=True, normalized=False) for name in names]
    options = {"vocab_size": 420, "special_tokens": special, "show_progress": False}
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        more_options = options | {"special_tokens": ["<unk>", *special], "initial_alphabet": ["\n", ":"]}
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **more_options)
    else:  # as Llama 2 has it: spaces become a letter, unknown characters their bytes
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        options["special_tokens"] = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *special]
        trainer = trainers.BpeTrainer(**(options | {"vocab_size": 700}))
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "sentencepiece_bpe":
        tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=eos)
