"""Faults in a published draft are refused by name; open questions are answered by a hint."""

import copy
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jeagle.errors import UserError
from jeagle.exchange import Hints, read_draft
from tests.exchange.drafts import (
    FULL,
    LLAMA3,
    PLAIN,
    SLIDING,
    SPECULATORS_ONLY,
    config_in,
    edit_config,
    edit_tensors,
    parameters,
    to_sglang,
    to_vllm,
)


def _set(**fields):
    return lambda config: config.update(fields)


def _drop(*names):
    return lambda config: [config.pop(name) for name in names]


def _nested(**fields):
    return lambda config: config["eagle_config"].update(fields)


def _inner(**fields):
    return lambda config: config["transformer_layer_config"].update(fields)


PLAIN_CONFIG_FAULTS = {
    "other architecture": (_set(architectures=["EagleLlamaForCausalLM"]), "architectures"),
    "no hidden_size": (_drop("hidden_size"), "hidden_size"),
    "hidden_size is text": (_set(hidden_size="24"), "hidden_size"),
    "no vocab_size": (_drop("vocab_size"), "vocab_size"),
    "a switch is text, which is true": (_set(norm_before_residual="false"), "it must be true or false"),
    "an end is text": (_set(eos_token_id="</s>"), "eos_token_id"),
    "an end is a list of lists": (_set(eos_token_id=[[2]]), "eos_token_id"),
    "epsilon below 0": (_set(rms_norm_eps=-1e-5), "rms_norm_eps"),
    "no epsilon": (_drop("rms_norm_eps"), "rms_norm_eps"),
    "other activation": (_set(hidden_act="gelu"), "hidden_act"),
    "other model_type": (_set(model_type="gpt_oss"), "model_type"),
    "biases in the MLP": (_set(mlp_bias=True), "mlp_bias"),
    "a bias of fc": (_set(bias=True), "bias"),
    "tied head": (_set(tie_word_embeddings=True), "tie_word_embeddings"),
    "part of a head rotated": (_set(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "no target layers read": (_nested(use_aux_hidden_state=False), "use_aux_hidden_state"),
    "two sets of aux layers": (_nested(eagle_aux_hidden_state_layer_ids=[2, 4, 5]), "two sets of target layers"),
    "aux layers in falling order": (
        lambda c: (c.update(eagle_aux_hidden_state_layer_ids=[5, 4, 2]), c.pop("eagle_config")),
        "rising",
    ),
    "number of aux layers": (_set(num_aux_hidden_states=4), "num_aux_hidden_states"),
    "misspelt flag": (_set(norm_ouput=True), "norm_output"),
    "another theta": (_set(rope_theta=9.0), "rope_theta"),
    "scaling lost": (_set(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}), "rope_scaling"),
    "two layer types for one layer": (_set(layer_types=[FULL, SLIDING], sliding_window=8), "2 layer_types for num_hid"),
    "a mixture without a width": (_set(layer_types=[FULL, SLIDING], num_hidden_layers=2), "but no sliding_window"),
    "window without a width": (_set(layer_types=[SLIDING]), "sliding_window"),
    "another layer type": (_set(layer_types=["chunked_attention"]), "'chunked_attention' in its layer_types"),
    "norm_before_fc without its tensor": (_set(norm_before_fc=True), "input_norm"),
    "fc_norm without its tensors": (_set(fc_norm=True), "fc_norm"),
    "both norms": (_set(fc_norm=True, norm_before_fc=True), "exclude"),
    "two layers, one stored": (_set(num_hidden_layers=2), r"layers\.1"),
    "other head_dim": (_set(head_dim=8), "o_proj|q_proj|k_proj"),
    "other draft vocabulary": (_set(draft_vocab_size=17), r"lm_head|d2t"),
    "other target width": (_set(target_hidden_size=20), "embed_tokens"),
    "other aux layers": (
        lambda c: (_set(eagle_aux_hidden_state_layer_ids=[2, 4], num_aux_hidden_states=2)(c), c.pop("eagle_config")),
        r"fc\.weight",
    ),
}


@pytest.mark.parametrize("fault", PLAIN_CONFIG_FAULTS)
def test_a_faulty_plain_config_is_refused_by_field(fault, tmp_path):
    change, named = PLAIN_CONFIG_FAULTS[fault]
    folder = to_sglang(dataclasses.replace(PLAIN, rope=LLAMA3), tmp_path / "draft")
    edit_config(folder, change)
    with pytest.raises(UserError, match=named):
        read_draft(folder)


SPECULATORS_CONFIG_FAULTS = {
    "another method": (_set(speculators_model_type="peagle"), "peagle"),
    "no decoder": (_drop("transformer_layer_config"), "transformer_layer_config"),
    "no model_type": (lambda c: c["transformer_layer_config"].pop("model_type"), "model_type"),
    "no norm_before_residual": (_drop("norm_before_residual"), "norm_before_residual"),
    "no aux layers": (_drop("eagle_aux_hidden_state_layer_ids"), "eagle_aux_hidden_state_layer_ids"),
    "llama for qwen3": (_inner(model_type="llama"), "q_norm|k_norm"),
    "part of a head rotated": (_inner(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "wrong number of aux layers": (_inner(num_aux_hidden_states=4), "num_aux_hidden_states"),
}


@pytest.mark.parametrize("fault", SPECULATORS_CONFIG_FAULTS)
def test_a_faulty_speculators_config_is_refused_by_field(fault, tmp_path):
    change, named = SPECULATORS_CONFIG_FAULTS[fault]
    folder = to_vllm(SPECULATORS_ONLY["qk_norm"], tmp_path / "draft")
    edit_config(folder, change)
    with pytest.raises(UserError, match=named):
        read_draft(folder)


def _absolute(tensors):
    tensors["d2t"] = tensors["d2t"] + np.arange(16)


def _twice(tensors):
    tensors["layers.0.hidden_norm.weight"] = tensors["midlayer.hidden_norm.weight"]


def _put(**arrays):
    return lambda tensors: tensors.update({name.replace("__", "."): array for name, array in arrays.items()})


TENSOR_FAULTS = {
    "absolute ids for offsets": (_absolute, "d2t holds target ids"),
    "no map": (_drop("d2t"), "d2t"),
    "mask of another draft": (lambda t: t["t2d"].__setitem__(slice(None), np.roll(t["t2d"], 1)), "t2d"),
    "mask of another size": (_put(t2d=np.ones(39, bool)), "t2d"),
    "map of another size": (_put(d2t=np.zeros(15, np.int64)), "d2t"),
    "ids beyond V, no mask": (lambda t: (t.pop("t2d"), t.update(d2t=t["d2t"] + 9)), "map of ids"),
    "no fc": (_drop("fc.weight"), r"fc\.weight"),
    "no norm": (_drop("norm.weight"), r"norm\.weight"),
    "no head": (_drop("lm_head.weight"), r"lm_head\.weight"),
    "a prefix, and without": (lambda t: t.update({"model.norm.weight": t["norm.weight"]}), r"norm\.weight.*twice"),
    "an engine's own name": (lambda t: t.update({"model.fc2.weight": t.pop("fc.weight")}), r"fc\.weight"),
    "unknown tensor": (_put(mask_hidden=np.ones(3, np.float32)), "mask_hidden"),
    "layer twice": (_twice, "twice"),
    "kernel not turned": (lambda t: t.update({"fc.weight": t["fc.weight"].T.copy()}), r"fc\.weight"),
    "NaN": (lambda t: t["fc.weight"].__setitem__((0, 0), np.nan), r"fc\.weight.*NaN"),
    "whole numbers": (_put(norm__weight=np.ones(24, np.int32)), r"norm\.weight.*int32"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faulty_tensors_are_refused_by_name(fault, tmp_path):
    change, named = TENSOR_FAULTS[fault]
    folder = to_sglang(PLAIN, tmp_path / "draft")
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=named):
        read_draft(folder)


def test_a_folder_without_a_complete_draft_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_draft(tmp_path / "nowhere")
    folder = to_sglang(PLAIN, tmp_path / "draft")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            read_draft(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not a complete file"):
        read_draft(folder)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            read_draft(folder)


def _fields(tree, at=()):
    for name, value in tree.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from _fields(value, (*at, name))


@pytest.mark.parametrize("layout", ["plain", "speculators"])
@pytest.mark.parametrize("value", [..., None, "text", [1], -3], ids=["missing", "null", "text", "list", "negative"])
def test_a_wrong_value_of_any_field_gives_at_most_one_sentence(layout, value, tmp_path):
    """Either the draft is read without the field, or it is refused."""
    folder = to_vllm(dataclasses.replace(PLAIN, rope=LLAMA3), tmp_path / "draft", layout=layout)
    whole = config_in(folder)
    for path in _fields(whole):
        config = copy.deepcopy(whole)
        tree = config
        for name in path[:-1]:
            tree = tree[name]
        tree.pop(path[-1]) if value is ... else tree.update({path[-1]: value})
        (folder / "config.json").write_text(json.dumps(config))
        assert "\n" not in refusal(folder), path


def refusal(folder) -> str:
    """Empty where the draft is read."""
    try:
        read_draft(folder)
    except UserError as error:
        return str(error)
    return ""


# Where a published folder leaves a question open, an answer is required; an answer that contradicts it is refused.


def test_missing_aux_layers_must_be_given(tmp_path):
    folder = to_sglang(PLAIN, tmp_path / "draft")
    edit_config(folder, _drop("eagle_aux_hidden_state_layer_ids", "eagle_config"))
    with pytest.raises(UserError, match="eagle_aux_hidden_state_layer_ids"):
        read_draft(folder)
    assert read_draft(folder, Hints(aux_layers=(1, 2, 3))).spec.aux_layers == (1, 2, 3)


def test_nested_ids_alone_count_one_layer_less(tmp_path):
    folder = to_sglang(PLAIN, tmp_path / "draft")
    edit_config(folder, _drop("eagle_aux_hidden_state_layer_ids"))
    assert config_in(folder)["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert read_draft(folder).spec.aux_layers == (2, 4, 5)
    with pytest.raises(UserError, match=r"\[2, 4, 5\], not \[1, 3, 4\]"):
        read_draft(folder, Hints(aux_layers=(1, 3, 4)))


def test_a_hint_must_be_one_of_two_contradicting_lists_of_aux_layers(tmp_path):
    folder = to_sglang(PLAIN, tmp_path / "draft")
    edit_config(folder, _nested(eagle_aux_hidden_state_layer_ids=[2, 4, 5]))
    assert read_draft(folder, Hints(aux_layers=(2, 4, 5))).spec.aux_layers == (2, 4, 5)
    assert read_draft(folder, Hints(aux_layers=(3, 5, 6))).spec.aux_layers == (3, 5, 6)
    with pytest.raises(UserError, match="two sets"):
        read_draft(folder, Hints(aux_layers=(1, 2, 3)))


@pytest.mark.parametrize("written", [True, False])
def test_norm_output_has_two_meanings_in_a_plain_folder_of_another_trainer(written, tmp_path):
    folder = to_sglang(PLAIN, tmp_path / "draft")
    edit_config(folder, lambda c: (c.pop("jeagle_version"), c.update(norm_output=written)))
    with pytest.raises(UserError, match="norm_output"):
        read_draft(folder)
    carried = read_draft(folder, Hints(norm_output="carry")).spec
    assert (carried.carry_normed, carried.head_norm) == (written, True)
    head = read_draft(folder, Hints(norm_output="head")).spec
    assert (head.carry_normed, head.head_norm) == (False, written)


def test_fields_that_a_config_lacks_come_from_the_tensors(tmp_path):
    spec = dataclasses.replace(PLAIN, head_dim=10)
    folder = to_sglang(spec, tmp_path / "draft")
    edit_config(folder, _drop("head_dim", "draft_vocab_size", "target_hidden_size"))
    assert read_draft(folder).spec == spec


def test_the_type_of_an_older_rope_scaling_is_read(tmp_path):
    folder = to_sglang(PLAIN, tmp_path / "draft")
    edit_config(folder, _drop("rope_parameters"))
    edit_config(folder, _set(rope_scaling={"type": "linear", "factor": 2.0}))
    assert read_draft(folder).spec.rope.scaling == (("factor", 2.0), ("rope_type", "linear"))


def test_bfloat16_is_read_exactly(tmp_path):
    folder = to_sglang(PLAIN, tmp_path / "draft", dtype="bfloat16")
    rounded = parameters(PLAIN)["fc"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read_draft(folder).params["fc"], rounded.astype(np.float32))


ROPES = {
    "for each kind of layer": (
        {"full_attention": {"rope_theta": 9e5}, "sliding_attention": {"rope_theta": 1e4}},
        r"RoPE for each kind of layer \(full_attention, sliding_attention\)",
    ),
    "for a part of each head": (
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "partial_rotary_factor",
    ),
    "of an unknown kind": ({"rope_type": "spiral", "rope_theta": 1e4}, "RoPE scaling 'spiral'"),
    "with factor 0": ({"rope_type": "linear", "factor": 0, "rope_theta": 1e4}, "factor 0; it must be a number above 0"),
    "with length 0": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0, "rope_theta": 1e4},
        "original_max_position_embeddings 0; it must be an integer above 0",
    ),
    "with base 0": ({"rope_type": "default", "rope_theta": 0}, "rope_theta 0; it must be a number above 0"),
    "with a factor 0 in a list": (
        {"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 0, 2], "rope_theta": 1e4},
        "long_factor .* must be a list of numbers above 0",
    ),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])  # of transformers 5, and of 4
@pytest.mark.parametrize("write", [to_sglang, to_vllm])
def test_an_unsupported_rope_is_refused_in_both_schemas_and_layouts(rope, field, write, tmp_path):
    """Read as plain RoPE, it would rotate every key by other angles than the draft was trained with."""
    parameters, named = ROPES[rope]

    def change(config):
        decoder = config.get("transformer_layer_config", config)
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            decoder.pop(name, None)
        decoder[field] = parameters

    folder = write(PLAIN, tmp_path / "draft")
    edit_config(folder, change)
    with pytest.raises(UserError, match=named):
        read_draft(folder)
