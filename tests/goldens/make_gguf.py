"""Makes gguf/: tiny models of every architecture that is read from GGUF, as llama.cpp's own converter writes them.

A model's configuration and the names of its tensors come from transformers; its weights are `seeded_weights`,
sixteenths that every float type holds exactly: a permuted row or a shifted norm is no rounding.
llama.cpp's convert_hf_to_gguf.py then writes it, in float16, without a tokenizer.

Run it in an environment of its own, from the repository's root, with the folder of llama.cpp's source (the archive of
the package llama-cpp-python 0.3.36 has it under vendor/llama.cpp):

    python3.11 -m venv goldens_env
    goldens_env/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy sentencepiece pyyaml
    goldens_env/bin/python tests/goldens/make_gguf.py vendor/llama.cpp

models.json holds each model's config.json and the shapes of its tensors by Hugging Face's names.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "gguf"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"num_key_value_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONGROPE |= {"original_max_position_embeddings": 32, "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]}
LONGROPE |= {"long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}
# name -> (transformers' class without ForCausalLM, what differs from SMALL)
MODELS: dict[str, tuple[str, dict]] = {
    "deepseek2": (
        "DeepseekV2",
        EXPERTS
        | LATENT
        | {"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None}
        | {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek3": (
        "DeepseekV3",
        EXPERTS
        | LATENT
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 10}
        | {"n_group": 2, "topk_group": 1, "scoring_func": "sigmoid", "norm_topk_prob": True}
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "gemma": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
        | {"num_hidden_layers": 7},
    ),
    "glm4": ("Glm4", {"head_dim": 8, "attention_bias": True}),
    "glm4moe": (
        "Glm4Moe",
        EXPERTS
        | {"head_dim": 8, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
    ),
    "gpt-oss": ("GptOss", {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"logits_scaling": 8.0, "tie_word_embeddings": True},
    ),
    "llama": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}
        | {"rope_parameters": LLAMA3},
    ),
    "ministral3": (
        "Ministral3",
        {"head_dim": 8, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 8}),
    "phi3": (
        "Phi3",
        {"hidden_size": 32, "sliding_window": None, "original_max_position_embeddings": 32}
        | {"rope_parameters": LONGROPE},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2moe": ("Qwen2Moe", EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "qwen3moe": ("Qwen3Moe", EXPERTS | {"num_experts": 3, "head_dim": 8, "norm_topk_prob": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
}


def seeded_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Sixteenths in -1..1, the same for a name and shape wherever they are made."""
    return {
        name: (np.random.default_rng(zlib.crc32(name.encode())).integers(-16, 17, shape) / 16).astype(np.float32)
        for name, shape in shapes.items()
    }


def _checkpoint(name: str, folder: Path) -> dict:
    """Writes a Hugging Face folder; returns its entry of models.json."""
    import transformers
    from safetensors.numpy import load_file, save_file

    kind, options = MODELS[name]
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**SMALL | options)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    weights = folder / "model.safetensors"
    shapes = {tensor: list(value.shape) for tensor, value in sorted(load_file(weights).items())}
    save_file(seeded_weights(shapes), weights, metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {str(i): i for i in range(SMALL["vocab_size"])}}, "added_tokens": []})
    )  # Gemma 3's converter counts its entries
    return {"config": json.loads((folder / "config.json").read_text()), "shapes": shapes}


def _convert(folder: Path, out: Path) -> None:
    import conversion
    import gguf
    import torch
    from conversion.base import ModelBase, ModelType, get_model_architecture

    params = ModelBase.load_hparams(folder, False)
    converter = conversion.get_model_class(get_model_architecture(params, ModelType.TEXT))
    converter.set_vocab = lambda self: None
    with torch.inference_mode():
        model = converter(folder, gguf.LlamaFileType.MOSTLY_F16, out)
        if hasattr(model, "impl"):
            type(model.impl).set_vocab = lambda self: None
        model.write()


def main() -> None:
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    HERE.mkdir(exist_ok=True)
    entries = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            entries[name] = _checkpoint(name, Path(folder) / name)  # the converter writes the folder's name down
            _convert(Path(folder) / name, HERE / f"{name}.gguf")
    lines = (f'"{name}": {json.dumps(entry, sort_keys=True)}' for name, entry in entries.items())
    (HERE / "models.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
