"""Laws of the exchange: an export reads back as the same draft, and its files are what engines read."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoConfig, LlamaConfig

from jeagle.drafts import Eagle3
from jeagle.exchange import expected_shapes, read_draft
from tests.exchange.drafts import (
    BOTH_ENGINES,
    CARD,
    LLAMA3,
    LONG,
    PLAIN,
    SPECULATORS_ONLY,
    VLLM_ONLY,
    config_in,
    edit_tensors,
    embedding,
    parameters,
    target_ids,
    tensors_in,
    to_sglang,
    write,
)

CASES = [("sglang", name) for name in BOTH_ENGINES]
CASES += [("vllm-plain", name) for name in BOTH_ENGINES | VLLM_ONLY]
CASES += [("vllm-speculators", name) for name in BOTH_ENGINES | VLLM_ONLY | SPECULATORS_ONLY]
SPECS = BOTH_ENGINES | VLLM_ONLY | SPECULATORS_ONLY


def export(how, spec, out, **settings):
    engine, _, layout = how.partition("-")
    settings = {"card": CARD, "embed_VW": embedding(spec)} | settings
    return write({"sglang": "SGLang", "vllm": "vLLM"}[engine], layout or "plain", spec, out, **settings)


@pytest.mark.parametrize(("how", "name"), CASES)
def test_an_export_reads_back_bit_for_bit(how, name, tmp_path):
    spec = SPECS[name]
    draft = read_draft(export(how, spec, tmp_path / "draft"))
    assert draft.spec == spec
    assert draft.params.keys() == parameters(spec).keys()
    for name, array in parameters(spec).items():
        assert draft.params[name].dtype == np.float32
        np.testing.assert_array_equal(draft.params[name], array, err_msg=name)
    ids = target_ids(spec)
    np.testing.assert_array_equal(draft.draft_to_target_D, np.arange(spec.target_vocab) if ids is None else ids)
    if embedding(spec) is None:
        assert draft.embed_VW is None
    else:
        np.testing.assert_array_equal(draft.embed_VW, embedding(spec))


@pytest.mark.parametrize("name", SPECS)
def test_the_exchange_names_every_parameter_of_the_draft_that_is_trained(name):
    spec = SPECS[name]
    leaves = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Eagle3(spec, np.float32, nnx.Rngs(0))), nnx.Param))
    assert {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in leaves} == expected_shapes(spec)


def test_the_plain_layout_has_the_names_and_shapes_that_both_engines_load(tmp_path):
    spec = PLAIN
    tensors = tensors_in(export("sglang", spec, tmp_path / "draft"))
    assert {name: array.shape for name, array in tensors.items()} == {
        "fc.weight": (24, 3 * 24),
        "midlayer.input_layernorm.weight": (24,),
        "midlayer.hidden_norm.weight": (24,),
        "midlayer.post_attention_layernorm.weight": (24,),
        "midlayer.self_attn.q_proj.weight": (4 * 6, 2 * 24),
        "midlayer.self_attn.k_proj.weight": (2 * 6, 2 * 24),
        "midlayer.self_attn.v_proj.weight": (2 * 6, 2 * 24),
        "midlayer.self_attn.o_proj.weight": (24, 4 * 6),
        "midlayer.mlp.gate_proj.weight": (28, 24),
        "midlayer.mlp.up_proj.weight": (28, 24),
        "midlayer.mlp.down_proj.weight": (24, 28),
        "norm.weight": (24,),
        "lm_head.weight": (16, 24),
        "d2t": (16,),
        "t2d": (40,),
    }
    assert tensors["d2t"].dtype == np.int64
    assert tensors["t2d"].dtype == np.bool_
    np.testing.assert_array_equal(np.arange(16) + tensors["d2t"], target_ids(spec))
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), target_ids(spec))
    for name, array in parameters(spec).items():
        torch_name = name.replace("layers.0", "midlayer") + ".weight"
        stored = array.T if array.ndim == 2 and name != "lm_head" else array
        np.testing.assert_array_equal(tensors[torch_name], stored, err_msg=name)


def test_square_kernels_are_transposed_too(tmp_path):
    """24 x 24: a check of shapes alone would not notice it."""
    spec = dataclasses.replace(PLAIN, aux_layers=(4,))
    params, tensors = parameters(spec), tensors_in(export("sglang", spec, tmp_path / "draft"))
    for name, torch_name in {"fc": "fc", "layers.0.self_attn.o_proj": "midlayer.self_attn.o_proj"}.items():
        assert params[name].shape == (24, 24)
        np.testing.assert_array_equal(tensors[f"{torch_name}.weight"], params[name].T)


@pytest.mark.parametrize("name", BOTH_ENGINES)
def test_one_plain_folder_gives_both_engines_the_same_aux_layers(name, tmp_path):
    spec = BOTH_ENGINES[name]
    sglang, vllm = export("sglang", spec, tmp_path / "s"), export("vllm-plain", spec, tmp_path / "v")
    config = config_in(sglang)
    assert config == config_in(vllm)
    assert (sglang / "model.safetensors").read_bytes() == (vllm / "model.safetensors").read_bytes()
    vllm_captures = config["eagle_aux_hidden_state_layer_ids"]
    sglang_captures = [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    assert vllm_captures == sglang_captures == list(spec.aux_layers)


@pytest.mark.parametrize(("how", "name"), CASES)
def test_an_engine_sizes_its_modules_as_the_tensors_are(how, name, tmp_path):
    """The sizes that engines compute from config.json alone are those of the tensors in the file."""
    folder = export(how, SPECS[name], tmp_path / "draft")
    config, tensors = config_in(folder), tensors_in(folder)
    decoder = config.get("transformer_layer_config", config)
    features = config["target_hidden_size"] * decoder["num_aux_hidden_states"]
    first = "midlayer" if "midlayer.hidden_norm.weight" in tensors else "layers.0"
    assert tensors["fc.weight"].shape == (decoder["hidden_size"], features)
    assert ("input_norm.weight" in tensors) == config["norm_before_fc"]
    assert ("fc_norm.0.weight" in tensors) == config["fc_norm"]
    assert tensors["lm_head.weight"].shape == (config["draft_vocab_size"], decoder["hidden_size"])
    queries = decoder["num_attention_heads"] * decoder["head_dim"]
    assert tensors[f"{first}.self_attn.q_proj.weight"].shape == (queries, 2 * decoder["hidden_size"])
    assert (f"{first}.self_attn.q_proj.bias" in tensors) == decoder["attention_bias"]
    assert (f"{first}.self_attn.q_norm.weight" in tensors) == (decoder["model_type"] == "qwen3")
    assert ("d2t" in tensors) == ("t2d" in tensors) == (config["draft_vocab_size"] < decoder["vocab_size"])
    assert ("embed_tokens.weight" in tensors) == (config["target_hidden_size"] != decoder["hidden_size"])
    kinds = decoder.get("layer_types", ["full_attention"] * decoder["num_hidden_layers"])
    windows = tuple(decoder["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds)
    assert windows == SPECS[name].windows
    assert config["tie_word_embeddings"] is False
    assert isinstance(config["norm_before_residual"], bool)


def test_norm_output_means_the_same_to_vllm_in_both_layouts_and_never_misleads_specforge(tmp_path):
    carried = BOTH_ENGINES["carry_normed"]
    assert config_in(export("vllm-plain", carried, tmp_path / "a"))["norm_output"] is True
    assert config_in(export("vllm-speculators", carried, tmp_path / "b"))["norm_output"] is True
    assert config_in(export("vllm-speculators", PLAIN, tmp_path / "c"))["norm_output"] is False
    assert "norm_output" not in config_in(export("sglang", PLAIN, tmp_path / "d"))


@pytest.mark.parametrize("rope", [PLAIN.rope, LLAMA3, LONG], ids=["plain", "llama3", "longrope"])
@pytest.mark.parametrize("schema", ["both", "old", "new"])
def test_transformers_reads_the_rope_that_was_trained_from_either_schema(rope, schema, tmp_path):
    folder = export("sglang", dataclasses.replace(PLAIN, rope=rope), tmp_path / "draft")
    config = config_in(folder)
    for name in {"both": [], "old": ["rope_parameters"], "new": ["rope_theta", "rope_scaling"]}[schema]:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(read, LlamaConfig)
    parameters = dict(read.rope_parameters)
    assert parameters.pop("rope_theta") == rope.theta
    wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in rope.scaling} or {"rope_type": "default"}
    assert wanted.items() <= parameters.items()
    assert read_draft(folder).spec.rope == rope


def test_bfloat16_rounds_to_nearest_and_ties_to_even(tmp_path):
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x00000001, 0x3F800000], np.uint32)
    params = parameters(PLAIN)
    params["norm"][: len(bits)] = bits.view(np.float32)
    out = to_sglang(PLAIN, tmp_path / "draft", params=params, dtype="bfloat16")
    tensors = tensors_in(out)
    assert [hex(b) for b in tensors["norm.weight"].view(np.uint16)[: len(bits)]] == [
        "0x3f80",
        "0x3f82",
        "0x3f81",
        "0x3f80",
        "0xbf82",
        "0x0",
        "0x3f80",
    ]
    exact = params["lm_head"].view(np.uint32).astype(np.uint64)
    nearest = (exact + 0x7FFF + ((exact >> 16) & 1)) >> 16
    np.testing.assert_array_equal(tensors["lm_head.weight"].view(np.uint16), nearest)
    read = read_draft(out).params["lm_head"]
    np.testing.assert_array_equal(read.view(np.uint32), nearest.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_parameters_are_stored_in_the_type_asked_for_and_tables_never(dtype, tmp_path):
    folder = export("vllm-plain", BOTH_ENGINES["own_width"], tmp_path / "draft", dtype=dtype)
    types = {name: array.dtype.name for name, array in tensors_in(folder).items()}
    assert types.pop("d2t") == "int64"
    assert types.pop("t2d") == "bool"
    assert set(types.values()) == {dtype}
    assert config_in(folder)["torch_dtype"] == config_in(folder)["dtype"] == dtype


def test_an_embedding_of_the_targets_width_is_stored_only_on_request(tmp_path):
    rows = np.random.default_rng(3).normal(size=(40, 24)).astype(np.float32)
    asked = export("sglang", PLAIN, tmp_path / "a", embed_VW=rows, target_embed_VW=rows)
    np.testing.assert_array_equal(read_draft(asked).embed_VW, rows)
    assert "embed_tokens.weight" not in tensors_in(export("sglang", PLAIN, tmp_path / "b"))


def test_a_full_vocabulary_also_reads_from_zero_offsets_and_a_full_mask(tmp_path):
    spec = BOTH_ENGINES["full_vocabulary"]
    folder = export("sglang", spec, tmp_path / "draft")
    edit_tensors(folder, lambda t: t.update(d2t=np.zeros(40, np.int64), t2d=np.ones(40, bool)))
    np.testing.assert_array_equal(read_draft(folder).draft_to_target_D, np.arange(40))


def test_the_first_layer_reads_under_either_of_its_names(tmp_path):
    folder = export("sglang", PLAIN, tmp_path / "draft")

    def rename(tensors):
        for name in [n for n in tensors if n.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    edit_tensors(folder, rename)
    np.testing.assert_array_equal(
        read_draft(folder).params["layers.0.mlp.up_proj"], parameters(PLAIN)["layers.0.mlp.up_proj"]
    )


def test_shards_read_as_one_file(tmp_path):
    folder = export("sglang", PLAIN, tmp_path / "draft")
    tensors = tensors_in(folder)
    (folder / "model.safetensors").unlink()
    for i, names in enumerate([sorted(tensors)[:7], sorted(tensors)[7:]], start=1):
        save_file({name: tensors[name] for name in names}, folder / f"model-0000{i}-of-00002.safetensors")
    assert read_draft(folder).spec == PLAIN
