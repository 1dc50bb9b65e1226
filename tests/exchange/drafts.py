"""Small drafts of every kind that the exchange supports, their random parameters, and helpers that write them."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jeagle.exchange import Export, ExportCard, expected_shapes, write_export
from jeagle.interfaces import DraftSpec, Rope

LAYERS = 8
FULL, SLIDING = "full_attention", "sliding_attention"
NO_CARD = ExportCard()
CARD = ExportCard(target_ref="someone/tiny-llama", target_architectures=("LlamaForCausalLM",))

LLAMA3 = Rope(
    500000.0,
    (
        ("factor", 8.0),
        ("high_freq_factor", 4.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 1024),
        ("rope_type", "llama3"),
    ),
)
LONG = Rope(
    10000.0,
    (
        ("factor", 4.0),
        ("long_factor", (1.0, 2.5, 4.0)),
        ("original_max_position_embeddings", 512),
        ("rope_type", "longrope"),
        ("short_factor", (1.0, 1.5, 2.0)),
    ),
)

PLAIN = DraftSpec(
    target_width=24,
    width=24,
    target_vocab=40,
    draft_vocab=16,
    aux_layers=(2, 4, 5),
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=28,
    end_token_ids=(2,),
)

BOTH_ENGINES = {
    "plain": PLAIN,
    "full_vocabulary": dataclasses.replace(PLAIN, draft_vocab=40),
    "wide_heads": dataclasses.replace(PLAIN, head_dim=10, kv_heads=1),
    "llama3_rope": dataclasses.replace(PLAIN, rope=LLAMA3, max_positions=8192),
    "long_rope": dataclasses.replace(PLAIN, rope=LONG),
    "norm_before_fc": dataclasses.replace(PLAIN, norm_before_fc=True),
    "fc_norm": dataclasses.replace(PLAIN, fc_norm=True, norm_eps=1e-6),
    "carry_normed": dataclasses.replace(PLAIN, carry_normed=True),
    "own_width": dataclasses.replace(PLAIN, target_width=20),
    "four_aux_layers": dataclasses.replace(PLAIN, aux_layers=(1, 3, 5, 7)),
    "two_ends": dataclasses.replace(PLAIN, end_token_ids=(2, 7)),
    "no_end": dataclasses.replace(PLAIN, end_token_ids=()),
}
VLLM_ONLY = {
    "norm_before_residual": dataclasses.replace(PLAIN, norm_before_residual=True),
    "attention_bias": dataclasses.replace(PLAIN, attention_bias=True),
    "two_layers": dataclasses.replace(PLAIN, layers=2, attention_bias=True),
    "window": dataclasses.replace(PLAIN, sliding_window=16, layers=2),
    "windowed_last_layer": dataclasses.replace(PLAIN, sliding_window=16, layers=2, layer_types=(FULL, SLIDING)),
    "embeddings_and_last": dataclasses.replace(PLAIN, aux_layers=(0, 4, 8)),
}
SPECULATORS_ONLY = {
    "qk_norm": dataclasses.replace(PLAIN, qk_norm=True, layers=2, fc_norm=True, draft_vocab=40),
    "qk_norm_windowed_first_layer": dataclasses.replace(
        PLAIN, qk_norm=True, layers=3, sliding_window=8, layer_types=(SLIDING, FULL, FULL)
    ),
}


def parameters(spec, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in expected_shapes(spec).items()}


def target_ids(spec, seed=0):
    """None for a full vocabulary."""
    if spec.draft_vocab == spec.target_vocab:
        return None
    return np.sort(np.random.default_rng(seed).permutation(spec.target_vocab)[: spec.draft_vocab])


def embedding(spec, seed=1):
    """None where the draft uses the target's."""
    if spec.width == spec.target_width:
        return None
    return np.random.default_rng(seed).normal(size=(spec.target_vocab, spec.width)).astype(np.float32)


def write(
    engine,
    layout,
    spec,
    out,
    *,
    params=None,
    ids="matching",
    target_layers=LAYERS,
    dtype="float32",
    card=NO_CARD,
    **more,
):
    """Writes an export of random parameters, or of those given; `more` is for `write_export`."""
    params = parameters(spec) if params is None else params
    ids = target_ids(spec) if isinstance(ids, str) else ids
    return write_export(Export(engine, layout, dtype, str(out), spec, target_layers, card), params, ids, **more)


def to_sglang(spec, out, **settings):
    return write("SGLang", "plain", spec, out, **settings)


def to_vllm(spec, out, *, layout="speculators", **settings):
    return write("vLLM", layout, spec, out, **({"card": CARD} | settings))


def tensors_in(folder):
    with safe_open(Path(folder) / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def edit_tensors(folder, change):
    """`change` alters the dict of a folder's tensors in place."""
    tensors = tensors_in(folder)
    change(tensors)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def config_in(folder):
    return json.loads((Path(folder) / "config.json").read_text("utf-8"))


def edit_config(folder, change):
    """`change` alters the tree of a folder's config.json in place."""
    config = config_in(folder)
    change(config)
    (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")


def card_commands(folder):
    """The shell commands of an export's model card, as lists of arguments."""
    text = (Path(folder) / "README.md").read_text("utf-8")
    return [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
