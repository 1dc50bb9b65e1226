"""An export for SGLang contains what the EAGLE-3 draft of sglang-jax, SGLang's server for TPUs, reads.

Read in sgl-project/sglang-jax, commit cddbf6f of 21 August 2026: srt/models/llama_eagle3.py (the names that its loader
maps, each with the shape of the parameter behind it), srt/models/llama.py and srt/utils/weight_utils.py (what it reads
of config.json; d2t are offsets), srt/model_executor/model_runner.py (which aux layers of the target are used).
"""

import dataclasses

import numpy as np
import pytest

from jeagle.exchange import sglang_jax_limits
from tests.exchange.drafts import LAYERS, LLAMA3, PLAIN, config_in, target_ids, tensors_in, to_sglang

MAPPED = {  # name in the file -> its axes there; W hidden_size, H target_hidden_size, D draft_vocab_size
    "d2t": "D",
    "fc.weight": "W 3H",
    "lm_head.weight": "D W",
    "norm.weight": "W",
    "midlayer.hidden_norm.weight": "W",
    "midlayer.input_layernorm.weight": "W",
    "midlayer.post_attention_layernorm.weight": "W",
    "midlayer.mlp.down_proj.weight": "W F",
    "midlayer.mlp.gate_proj.weight": "F W",
    "midlayer.mlp.up_proj.weight": "F W",
    "midlayer.self_attn.q_proj.weight": "QC 2W",
    "midlayer.self_attn.k_proj.weight": "GC 2W",
    "midlayer.self_attn.v_proj.weight": "GC 2W",
    "midlayer.self_attn.o_proj.weight": "W QC",
}
NOT_READ = {"t2d"}
"""Nothing else may be in the file: sglang-jax drops a name that it does not map, without a message."""
READ = {  # fields of config.json; those that it cannot do without, and what they must be
    "architectures": lambda c: c["architectures"][0] == "LlamaForCausalLMEagle3",
    "model_type": lambda c: c["model_type"] == "llama",
    "num_hidden_layers": lambda c: c["num_hidden_layers"] == 1,
    "tie_word_embeddings": lambda c: c["tie_word_embeddings"] is False,
    "draft_vocab_size": lambda c: isinstance(c["draft_vocab_size"], int),
    "target_hidden_size": lambda c: isinstance(c["target_hidden_size"], int),  # it is read where it is there, null too
    "rope_theta": lambda c: isinstance(c["rope_theta"], float),
    "rope_parameters": lambda c: "rope_theta" in c["rope_parameters"],
    "attention_bias": lambda c: c["attention_bias"] is False,
    **{
        name: lambda c, name=name: c[name]
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    },
    **{name: lambda c, name=name: c[name] for name in ("vocab_size", "rms_norm_eps", "max_position_embeddings")},
}
SPECS = {
    "plain": PLAIN,
    "llama3 rope": dataclasses.replace(PLAIN, rope=LLAMA3, max_positions=8192),
    "full vocabulary": dataclasses.replace(PLAIN, draft_vocab=40),
}


@pytest.mark.parametrize("name", SPECS)
def test_an_export_for_sglang_is_what_sglang_jax_maps(name, tmp_path):
    spec = SPECS[name]
    assert sglang_jax_limits(spec, LAYERS, ("LlamaForCausalLM",)) == []
    folder = to_sglang(spec, tmp_path / "draft")
    config, tensors = config_in(folder), tensors_in(folder)
    sizes = {"W": spec.width, "H": spec.target_width, "D": spec.draft_vocab, "F": spec.mlp_width}
    sizes |= {"QC": spec.heads * spec.head_dim, "GC": spec.kv_heads * spec.head_dim}
    sizes |= {"3H": 3 * spec.target_width, "2W": 2 * spec.width}
    wanted = {n: tuple(sizes[axis] for axis in axes.split()) for n, axes in MAPPED.items()}
    if spec.draft_vocab == spec.target_vocab:
        del wanted["d2t"]  # without it the ids are 0, 1, 2, ...
    assert {n: array.shape for n, array in tensors.items() if n not in NOT_READ} == wanted
    assert [field for field, holds in READ.items() if field not in config or not holds(config)] == []


def test_the_offsets_become_the_targets_ids(tmp_path):
    offsets = tensors_in(to_sglang(PLAIN, tmp_path / "draft"))["d2t"]
    np.testing.assert_array_equal(offsets + np.arange(len(offsets)), target_ids(PLAIN))


UNSERVED = {
    "always uses": {"aux_layers": (1, 4, 5)},
    "always uses [2, 4, 5] of 8": {"aux_layers": (2, 4, 5, 6)},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "carry_normed": {"carry_normed": True},
    "norm_before_residual": {"norm_before_residual": True},
    "attention_bias": {"attention_bias": True},
    "qk_norm": {"qk_norm": True},
    "head_norm": {"head_norm": False},
    "layers is 2": {"layers": 2},
    "sliding_window": {"sliding_window": 8},
    "width is 24": {"target_width": 20},
}


@pytest.mark.parametrize("named", UNSERVED)
def test_a_draft_that_sglang_jax_would_serve_wrongly_has_a_reason(named):
    reasons = sglang_jax_limits(dataclasses.replace(PLAIN, **UNSERVED[named]), LAYERS, ("LlamaForCausalLM",))
    assert any(named in reason for reason in reasons), reasons


def test_a_target_without_aux_hidden_states_in_sglang_jax_has_a_reason():
    assert sglang_jax_limits(PLAIN, LAYERS, ("Qwen3ForCausalLM",)) == []
    assert "GptOssForCausalLM" in sglang_jax_limits(PLAIN, LAYERS, ("GptOssForCausalLM",))[0]
