"""A tiny random Llama with a real tokenizer and chats, written as files: everything a command needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "red",
    "bird",
    "fly",
    "over",
    "many",
    "green",
    "trees",
    "near",
    "some",
    "old",
    "stone",
    "house",
]
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 8, 32, 4, 2, 8, 48


def write_target(folder: Path, **config: Any) -> Path:
    """A folder with config.json, model.safetensors and a byte-level BPE tokenizer."""
    folder.mkdir(parents=True)
    vocab = write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config_json(vocab, **config)))
    save_file(weights(vocab), folder / "model.safetensors")
    return folder


def config_json(vocab: int, **fields: Any) -> dict[str, Any]:
    """A target's config.json, with these fields added or in place of its own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "eos_token_id": 1,
    } | fields


def weights(vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(vocab, WIDTH) * 3, "lm_head.weight": normal(vocab, WIDTH) * 3}
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    for i in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(WIDTH, np.float32)
    return tensors


def write_tokenizer(folder: Path) -> int:
    """-> the number of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return len(fast)


def write_chats(path: Path, count: int = 60) -> Path:
    rng = np.random.default_rng(1)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    lines = []
    for _ in range(count):
        turns = [("user", sentence(2, 8)), ("assistant", sentence(4, 20))] * int(rng.integers(1, 3))
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(folder: Path, **more: Any) -> list[str]:
    """Command-line flags of a small run under `folder`, its target and chats written there on first use."""
    target, chats = folder / "target", folder / "chats.jsonl"
    if not target.is_dir():
        write_target(target)
        write_chats(chats)
    settings = {
        "runs": folder / "runs",
        "name": "tiny",
        "target.ref": target,
        "target.dtype": "float32",
        "data.source": chats,
        "data.row-length": 64,
        "data.held-out": 0.1,
        "draft.vocab": 100,
        "draft.ttt-steps": 3,
        "train.batch-rows": 8,
        "train.dtype": "float32",
        "train.log-every": 1,
        "train.slot-buckets": 1,
        "train.held-out-rows": 0,
    } | {name.replace("__", ".").replace("_", "-"): value for name, value in more.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
