"""The tiny drafts that are served: targets made here, drafts trained by jeagle's own commands, in this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from jeagle import prepare, train
from tests import tiny

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 8, 64, 2, 1, 32, 96  # 32 is the least that vLLM's CPU attention has
MAX_POSITIONS = 256
# How much a layer adds to the stream: enough that the context decides, and little enough that a draft learns it.
BEND = 0.4

# The frequencies of every pair of dimensions but the fastest change, and few positions do for it to show.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A target and a draft for it.

    Attributes:
      family: of the target, llama or qwen3.
      config: what the target's config.json says otherwise than `config_json`.
      flags: of training.
    """

    family: str = "llama"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()


OTHER_LAYERS = ("--target.aux-layers", "1", "3", "6")
CASES = {
    # Everything that a fault can be planted in: a reduced vocabulary, layers of its own, a scaled RoPE.
    "small": Case(config={"rope_scaling": LLAMA3}, flags=OTHER_LAYERS),
    "full_vocabulary": Case(flags=("--draft.vocab", "0")),
    "norm_before_residual": Case(flags=("--draft.norm-before-residual", "True", "--draft.engines", "vllm")),
    "layer_ids": Case(flags=OTHER_LAYERS),
    "llama3_rope": Case(config={"rope_scaling": LLAMA3}),
    "qwen3": Case(family="qwen3"),
}


def make_run(case: Case, folder: Path) -> Path:
    """The run's folder, runs/tiny under `folder`, its draft trained."""
    write_target(folder / "target", case)
    tiny.write_chats(folder / "chats.jsonl", 200)
    flags = tiny.flags(
        folder,
        data__row_length=128,
        train__steps=200,
        train__learning_rate=3e-3,
        train__log_every=100,
        train__save_every=1000,
    )
    arguments = ["--config", str(ROOT / "configs" / "llama3_8b.py"), *flags, *case.flags]
    prepare.main(arguments)
    train.main(arguments)
    return folder / "runs" / "tiny"


def write_target(folder: Path, case: Case) -> None:
    """A random target in Hugging Face's form, with the tokenizer and template of `tests.tiny`."""
    folder.mkdir(parents=True)
    vocab = tiny.write_tokenizer(folder)
    config = config_json(case.family, vocab) | case.config
    (folder / "config.json").write_text(json.dumps(config))
    spoken = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(" " + " ".join(tiny.WORDS))["input_ids"]
    save_file(weights(case.family, vocab, sorted(set(spoken))), folder / "model.safetensors", metadata={"format": "pt"})


def config_json(family: str, vocab: int) -> dict[str, Any]:
    return tiny.config_json(
        vocab,
        architectures=[{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
        model_type=family,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        torch_dtype="float32",
    )


def weights(family: str, vocab: int, spoken: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)  # away from one, so that a lost norm shows

    tensors = {
        "model.embed_tokens.weight": normal(vocab, WIDTH, scale=8),
        "lm_head.weight": normal(vocab, WIDTH, scale=3),
    }
    tensors["lm_head.weight"][spoken] *= 3
    tensors["model.norm.weight"] = norm(WIDTH)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }.items():
            adds = name in ("self_attn.o_proj", "mlp.down_proj")
            tensors[f"{layer}{name}.weight"] = normal(*shape, scale=BEND if adds else 1.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = norm(WIDTH)
        if family == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{layer}self_attn.{name}.weight"] = norm(HEAD_DIM)
    return tensors
