"""Every key of published models' config.json is either supported or refused; none is ignored without being read.

published.json has the keys of published models, and the number of parameters where a model's card or files state one
for the text part alone. The goldens have the same spellings in tiny models, with numbers.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jeagle import targets
from jeagle.config import DataConfig, DraftConfig, RunConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.interfaces import Rope
from jeagle.layers.rope import attention_factor, inverse_frequencies
from jeagle.run import assemble, dataset
from jeagle.runtime.mesh import make_mesh
from jeagle.targets.checkpoint.load import abstract_target
from jeagle.targets.families import FAMILIES
from tests import tiny

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published.json").read_text())


def config_of(model: str, **switches) -> dict:
    config = copy.deepcopy(PUBLISHED[model]["config"]) | switches
    config.pop("quantization_config", None)  # as reading the weights takes it away
    return config


def spec_of(model: str, **switches):
    return targets.read_spec(config_of(model, **switches))


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_understood_and_has_its_size(model):
    spec = spec_of(model)
    assert spec.architecture in FAMILIES
    if size := PUBLISHED[model].get("parameters"):
        shapes = abstract_target(spec, "bfloat16", stacked=True).state
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == size


def test_every_family_has_a_published_model():
    # Ministral's own name came after its models, which are published as MistralForCausalLM.
    shown = {spec_of(model).architecture for model in PUBLISHED}
    assert set(FAMILIES) - shown == {"MinistralForCausalLM"}


@pytest.mark.parametrize(
    ("model", "switches", "said"),
    [
        ("Phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod = 2"),
        ("Phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("gemma-2-9b-it", {"sliding_window_size": 1024}, "sliding_window_size = 1024"),
        ("SmolLM2-135M-Instruct", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("Qwen3.5-9B", {"text_config": {"attn_output_gate": False}}, "attn_output_gate = False"),
        ("gpt-oss-20b", {"experts_per_token": 2}, "experts_per_token = 2"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        (
            "Qwen3-8B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5}},
            "extrapolation_factor = 0.5 in its rope_scaling",
        ),
    ],
)
def test_keys_that_change_numbers_are_refused_by_name(model, switches, said):
    inner = switches.pop("text_config", None)
    if inner:
        switches = {"text_config": config_of(model)["text_config"] | inner}
    with pytest.raises(UserError, match=said):
        spec_of(model, **switches)


def test_qwens_long_models_are_plain_within_their_first_chunk():
    assert spec_of("Qwen2.5-7B-Instruct-1M").max_positions == 262144 - 8192


def test_su_is_longrope():
    first = spec_of("Phi-3-mini-128k-instruct, first revision")
    assert first.rope == spec_of("Phi-3.5-mini-instruct").rope and first.rope.scaling_dict["rope_type"] == "longrope"


def test_attn_factor_is_applied_as_in_engines():
    """That of DeepSeek-R1-0528-Qwen3-8B cancels the factor by which YaRN multiplies queries and keys."""
    assert attention_factor(spec_of("DeepSeek-R1-0528-Qwen3-8B").rope) == pytest.approx(1.0)
    plain = spec_of("Qwen2.5-7B-Instruct, with the YaRN of its card").rope
    assert attention_factor(plain) == pytest.approx(0.1 * math.log(4) + 1)


def test_a_band_without_width_splits_wavelengths_in_two():
    """In Llama 4 Scout, low_freq_factor equals high_freq_factor."""
    rope = spec_of("Llama-4-Scout-17B-16E-Instruct").rope
    scaled, plain = inverse_frequencies(rope, 128), inverse_frequencies(Rope(rope.theta), 128)
    long = 2 * math.pi / plain > 8192
    assert 0 < long.sum() < 64
    np.testing.assert_allclose(scaled, np.where(long, plain / 16, plain), rtol=1e-12)


def test_llama4s_experts_may_be_tensors_of_their_own(tmp_path):
    """As quantised checkpoints of Llama 4 have them: experts.3.gate_proj.weight [out, in]."""
    golden = HERE / "goldens" / "llama4_multimodal"
    folder = Path(shutil.copytree(golden, tmp_path / "apart"))
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stem, whole = name.rsplit(".", 1)[0], tensors.pop(name)
        parts = {"down_proj": whole}
        if name.endswith("gate_up_proj"):
            parts = dict(zip(("gate_proj", "up_proj"), np.split(whole, 2, axis=-1), strict=True))
        for part, together in parts.items():
            for expert, kernel in enumerate(together):
                tensors[f"{stem}.{expert}.{part}.weight"] = np.ascontiguousarray(kernel.T)
    save_file(tensors, folder / "model.safetensors")
    mesh = make_mesh(devices=jax.devices()[:1])
    apart, together = (
        targets.load_target(targets.open_weights(targets.resolve(str(path))), mesh, "float32", stacked=False)
        for path in (folder, golden)
    )
    for ours, theirs in zip(jax.tree.leaves(apart.state), jax.tree.leaves(together.state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_multimodal_model_is_prepared_by_its_text_part(tmp_path):
    """Its vocabulary and layers are those of text_config, since config.json itself has neither."""
    folder = tiny.write_target(tmp_path / "target")
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    inner = {k: v for k, v in text.items() if k != "architectures"} | {"model_type": "mistral", "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": inner}))
    tensors = load_file(folder / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    config = RunConfig(
        "seeing",
        runs=str(tmp_path / "runs"),
        target=TargetConfig(ref=str(folder), dtype="float32"),
        data=DataConfig(source=str(tiny.write_chats(tmp_path / "chats.jsonl")), row_length=64, held_out=0.1),
        draft=DraftConfig(vocab=100),
    )
    assert dataset.prepare(config).statistics["train"]["documents"] > 0
    loaded = assemble.load_target(config, make_mesh(devices=jax.devices()[:1]))
    assert loaded.target.spec.layers == tiny.LAYERS and loaded.target.spec.vocab == text["vocab_size"]
    np.testing.assert_array_equal(np.asarray(loaded.target.model().head_rows()), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("model", "kind"), [("gpt-oss-20b", "chunked_attention"), ("gemma-3-1b-it", "chunked_attention")]
)
def test_an_unsupported_kind_of_layer_is_named(model, kind):
    layers = config_of(model)["num_hidden_layers"]
    with pytest.raises(UserError, match=f"{kind}' in its layer_types, which is not supported for"):
        spec_of(model, layer_types=["full_attention"] * (layers - 1) + [kind])
