"""Tokenising and masking as jeagle, SpecForge and speculators do it: conversations -> (tokens, supervised tokens)."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

QWEN_ASSISTANT = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n?)"

Masks = Callable[[list], tuple[int, int]]


def jeagle_masks(tokenizer: Any) -> Masks:
    from jeagle.config import DataConfig
    from jeagle.data.chat.render import Renderer
    from jeagle.data.preparation import RENDERING_THREADS
    from jeagle.data.sources.conversations import Conversation
    from jeagle.runtime.ahead import read_ahead

    renderer = Renderer(tokenizer, DataConfig(), (tokenizer.eos_token_id,))

    def masks(chats: list) -> tuple[int, int]:
        tokens = learnt = 0
        chunks = ([Conversation("", tuple(c)) for c in chats[i : i + 128]] for i in range(0, len(chats), 128))
        for found in read_ahead(chunks, renderer, threads=RENDERING_THREADS, depth=RENDERING_THREADS + 1):
            for documents in found:
                tokens += sum(len(d.ids) for d in documents)
                learnt += sum(int(d.supervised.sum()) for d in documents)
        return tokens, learnt

    return masks


def specforge_masks(checkout: Path, tokenizer: Any) -> Masks:
    stub("specforge", checkout / "specforge")
    stub("specforge.data", checkout / "specforge" / "data")
    stub("specforge.distributed", get_draft_sp_group=None, get_sp_ring_group=None)
    module = importlib.import_module("specforge.data.preprocessing")
    template = importlib.import_module("specforge.data.template").TEMPLATE_REGISTRY.get("qwen")

    def masks(chats: list) -> tuple[int, int]:
        found = module.preprocess_conversations(tokenizer, chats, template, max_length=1 << 20, tools=[[]] * len(chats))
        return sum(x.numel() for x in found["input_ids"]), sum(int(x.sum()) for x in found["loss_mask"])

    return masks


def speculators_masks(checkout: Path, tokenizer: Any) -> Masks:
    root = checkout / "src" / "speculators" if (checkout / "src").is_dir() else checkout / "speculators"
    stub("speculators", root)
    for name in ("data_generation", "train"):
        stub(f"speculators.{name}", root / name)
    stub("speculators.train.vocab_mapping", save_token_frequency_distribution=None)
    module = importlib.import_module("speculators.data_generation.preprocessing")

    def masks(chats: list) -> tuple[int, int]:
        found = module._preprocess_batch({"conversations": chats}, tokenizer, 1 << 20, QWEN_ASSISTANT)
        return sum(x.numel() for x in found["input_ids"]), sum(int(x.sum()) for x in found["loss_mask"])

    return masks


def stub(name: str, folder: Path | None = None, **members: Any) -> None:
    """A module that stands for a package's own __init__, which would import much more than is timed."""
    module = types.ModuleType(name)
    if folder is not None:
        module.__path__ = [str(folder)]
    module.__dict__.update(members)
    sys.modules[name] = module
