"""Runs the converters in this process, and writes targets that contain only what an export reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jeagle import import_draft
from tests import tiny
from tests.exchange.drafts import LAYERS


def import_run(source, out, *more):
    import_draft.main([str(source), "--out", str(out), *map(str, more)])
    return out


def target(folder: Path, embed_VW: np.ndarray, layers: int = LAYERS) -> Path:
    """Writes as much of a target as an export reads: its configuration, its tokenizer, and its embedding."""
    folder.mkdir(parents=True)
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1, "<end>": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = tiny.CHATML
    tokenizer.save_pretrained(folder)
    vocab, width = embed_VW.shape
    tree = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": vocab}
    tree |= {"intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(tree | {"num_key_value_heads": 2, "head_dim": 8}))
    save_file({"model.embed_tokens.weight": embed_VW}, folder / "model.safetensors")
    return folder


def blank_target(folder: Path, spec) -> Path:
    return target(folder, np.zeros((spec.target_vocab, spec.target_width), np.float32))


def convert(to, run, out, *more):
    to(["--checkpoint", str(run), "--out", str(out), *map(str, more)])
    return out
