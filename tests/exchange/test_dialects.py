"""Every trainer's published form is read as the same draft; what a form leaves open has as many readings as it has."""

import dataclasses
import json

import numpy as np
import pytest

from jeagle.errors import UserError
from jeagle.exchange import Hints, open_draft, read_export, readings
from jeagle.interfaces import Rope
from tests.exchange.drafts import PLAIN, edit_config, parameters, target_ids, tensors_in, to_sglang, to_vllm
from tests.exchange.peers import PEERS, write_peer
from tests.exchange.test_peer_features import torch_file

SPEC = dataclasses.replace(PLAIN, rope=Rope(500000.0), max_positions=4096, norm_eps=1e-6)
CONFIG = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 40,
    "draft_vocab_size": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "eos_token_id": 2,
}
OPEN = {"eagle": Hints(aux_layers=(2, 4, 5)), "automodel": Hints(aux_layers=(2, 4, 5))}
"""Both write no layer ids."""


def weights(tmp_path, spec=SPEC):
    tensors = tensors_in(to_vllm(spec, tmp_path / "weights"))
    return {name.replace("midlayer.", "layers.0."): array for name, array in tensors.items()}


@pytest.mark.parametrize("peer", PEERS)
def test_every_trainers_form_is_the_same_draft(peer, tmp_path):
    draft = read_export(write_peer(peer, tmp_path / "draft", weights(tmp_path), CONFIG), OPEN.get(peer))
    assert draft.spec == SPEC
    np.testing.assert_array_equal(draft.draft_to_target_D, target_ids(SPEC))
    for name, array in parameters(SPEC).items():
        np.testing.assert_array_equal(draft.params[name], array, err_msg=name)


def test_a_full_vocabulary_of_the_authors_own(tmp_path):
    spec = dataclasses.replace(SPEC, draft_vocab=40)
    folder = write_peer("eagle", tmp_path / "draft", weights(tmp_path, spec), CONFIG | {"draft_vocab_size": 40})
    draft = read_export(folder, Hints(aux_layers=(2, 4, 5)))
    assert draft.spec == spec
    np.testing.assert_array_equal(draft.draft_to_target_D, np.arange(40))


def test_model_optimizers_missing_last_norm_and_automodels_carried_norm(tmp_path):
    found = weights(tmp_path)
    nested = json.loads((write_peer("model_optimizer", tmp_path / "a", found, CONFIG) / "config.json").read_text())
    changed = nested["eagle_config"] | {"use_last_layernorm": False}
    folder = write_peer("model_optimizer", tmp_path / "b", found, CONFIG, eagle_config=changed)
    assert read_export(folder).spec == dataclasses.replace(SPEC, head_norm=False)
    folder = write_peer("automodel", tmp_path / "c", found, CONFIG, norm_output=True)
    assert read_export(folder, Hints(aux_layers=(2, 4, 5))).spec == dataclasses.replace(SPEC, carry_normed=True)


REFUSED = {
    "first norm": ("model_optimizer", {"use_input_layernorm_in_first_layer": False}, "use_input_layernorm"),
    "mtp norm": ("model_optimizer", {"use_mtp_layernorm": True}, "use_mtp_layernorm"),
    "parallel": ("model_optimizer", {"parallel_draft_step": 4}, "parallel_draft_step"),
    "later layers": ("model_optimizer", {"next_layer_regular": False}, "next_layer_regular"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_known_trainer_has_and_jeagle_has_not_is_refused_by_field(fault, tmp_path):
    peer, changed, named = REFUSED[fault]
    folder = write_peer(peer, tmp_path / "draft", weights(tmp_path), CONFIG)
    edit_config(folder, lambda config: config["eagle_config"].update(changed))
    with pytest.raises(UserError, match=named):
        open_draft(folder)


def test_a_parallel_draft_of_automodel_is_refused(tmp_path):
    folder = write_peer("automodel", tmp_path / "draft", weights(tmp_path), CONFIG, parallel_drafting=True)
    with pytest.raises(UserError, match="parallel_drafting"):
        open_draft(folder)


def test_an_older_eagle_is_no_eagle_3(tmp_path):
    found = {name: a for name, a in weights(tmp_path).items() if "hidden_norm" not in name}
    folder = write_peer("eagle", tmp_path / "draft", found, CONFIG)
    with pytest.raises(UserError, match="architectures"):
        read_export(folder, Hints(aux_layers=(2, 4, 5)))


def test_parts_are_one_draft_and_a_missing_part_is_told(tmp_path):
    found = weights(tmp_path)
    folder = write_peer("eagle", tmp_path / "draft", found, CONFIG)
    named = {name.replace("layers.0.", "midlayer."): a for name, a in found.items()}
    (folder / "pytorch_model.bin").unlink()
    half = sorted(named)[:7]
    first = {name: named[name] for name in half}
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(torch_file(first))
    with pytest.raises(UserError, match="1 of 2 parts"):
        open_draft(folder)
    rest = {name: array for name, array in named.items() if name not in half}
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(torch_file(rest))
    assert read_export(folder, Hints(aux_layers=(2, 4, 5))).spec == SPEC


def answers(folder, target_layers, **hints):
    return [(r.answers, r.spec) for r in readings(open_draft(folder), Hints(**hints), target_layers)]


@pytest.mark.parametrize("peer", ["specforge", "sglang", "speculators", "model_optimizer"])
def test_what_a_trainers_own_convention_answers_is_not_asked(peer, tmp_path):
    folder = write_peer(peer, tmp_path / "draft", weights(tmp_path), CONFIG)
    assert answers(folder, None) == [({}, SPEC)]


def test_with_a_target_layer_ids_are_measured_one_deeper_too(tmp_path):
    found = weights(tmp_path)
    nested = answers(write_peer("specforge", tmp_path / "a", found, CONFIG), 8)
    assert [a for a, _ in nested] == [{"aux_layers": (2, 4, 5)}, {"aux_layers": (1, 3, 4)}]
    top = answers(write_peer("speculators", tmp_path / "b", found, CONFIG), 8)
    assert [a for a, _ in top] == [{"aux_layers": (2, 4, 5)}, {"aux_layers": (3, 5, 6)}]
    assert answers(to_sglang(SPEC, tmp_path / "ours"), 8) == [({}, SPEC)]


def test_without_layer_ids_the_target_or_the_user_tells(tmp_path):
    folder = write_peer("eagle", tmp_path / "draft", weights(tmp_path), CONFIG)
    with pytest.raises(UserError, match="--taps"):
        answers(folder, None)
    assert [a for a, _ in answers(folder, 8)] == [{"aux_layers": (2, 4, 5)}, {"aux_layers": (3, 5, 6)}]
    assert answers(folder, None, aux_layers=(2, 4, 5)) == [({}, SPEC)]


def test_the_meaning_of_norm_output_is_open_where_the_trainer_is_unknown(tmp_path):
    folder = write_peer("specforge", tmp_path / "draft", weights(tmp_path), CONFIG, norm_output=True)
    assert answers(folder, None) == [
        ({"norm_output": "head"}, SPEC),
        ({"norm_output": "carry"}, dataclasses.replace(SPEC, carry_normed=True)),
    ]
    assert answers(folder, None, norm_output="head") == [({}, SPEC)]


def test_the_residual_is_open_where_speculators_form_is_silent(tmp_path):
    folder = write_peer("speculators", tmp_path / "draft", weights(tmp_path), CONFIG)
    edit_config(folder, lambda config: config.pop("norm_before_residual"))
    assert [spec.norm_before_residual for _, spec in answers(folder, None)] == [False, True]
    assert answers(folder, None, norm_before_residual=True)[0][1].norm_before_residual
    both = answers(folder, 8)
    assert len(both) == 4 and len({spec for _, spec in both}) == 4


def test_two_lists_that_contradict_each_other_are_two_readings(tmp_path):
    folder = to_sglang(SPEC, tmp_path / "draft")
    edit_config(folder, lambda c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[2, 4, 5]))
    assert [a["aux_layers"] for a, _ in answers(folder, None)] == [(2, 4, 5), (3, 5, 6)]


SU = {"type": "su", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]}


def test_longrope_is_completed_as_transformers_does_it(tmp_path):
    """By its first name, its lengths outside the scaling (as Phi-3 writes them), or none but the longest."""
    found = weights(tmp_path)
    told = write_peer(
        "specforge", tmp_path / "a", found, CONFIG, rope_scaling=SU, original_max_position_embeddings=1024
    )
    rope = read_export(told).spec.rope.scaling_dict
    assert (rope["rope_type"], rope["original_max_position_embeddings"], rope["factor"]) == ("longrope", 1024, 4.0)
    silent = write_peer("specforge", tmp_path / "b", found, CONFIG, rope_scaling=SU)
    rope = read_export(silent).spec.rope.scaling_dict
    assert (rope["original_max_position_embeddings"], rope["factor"]) == (4096, 1.0)


ROPES = {
    "no long factors": ({"type": "longrope", "short_factor": [1, 1, 1]}, "longrope without long_factor"),
    "one pair short": (SU | {"long_factor": [1, 2]}, r"long_factor \[1, 2\]; heads of 6 dimensions need 3"),
    "one number": (SU | {"short_factor": 2.0}, "short_factor 2.0"),
    "scales of its own": (SU | {"short_mscale": 1.2}, "short_mscale"),
    "no factor": ({"rope_type": "linear"}, "linear without factor"),
    "half of llama3": ({"rope_type": "llama3", "factor": 8.0}, "llama3 without low_freq_factor"),
}


@pytest.mark.parametrize("fault", ROPES)
def test_a_scaling_that_lacks_a_number_is_refused_when_it_is_read(fault, tmp_path):
    scaling, named = ROPES[fault]
    folder = write_peer("specforge", tmp_path / "draft", weights(tmp_path), CONFIG, rope_scaling=scaling)
    with pytest.raises(UserError, match=named):
        read_export(folder)
