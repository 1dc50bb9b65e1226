"""Every trainer's published form is read as the same draft; what jeagle does not support is refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from jeagle.errors import UserError
from jeagle.exchange import Hints, open_draft_folder, read_draft
from tests.exchange.drafts import edit_config, parameters, target_ids
from tests.exchange.peers import CONFIG, PEERS, SPEC, weights, write_peer
from tests.exchange.test_peer_features import torch_file

HINTS = {"eagle": Hints(aux_layers=(2, 4, 5)), "automodel": Hints(aux_layers=(2, 4, 5))}
"""These two write no layer ids."""


@pytest.mark.parametrize("peer", PEERS)
def test_every_trainers_form_is_the_same_draft(peer, tmp_path):
    draft = read_draft(write_peer(peer, tmp_path / "draft", weights(tmp_path), CONFIG), HINTS.get(peer))
    assert draft.spec == SPEC
    np.testing.assert_array_equal(draft.draft_to_target_D, target_ids(SPEC))
    for name, array in parameters(SPEC).items():
        np.testing.assert_array_equal(draft.params[name], array, err_msg=name)


@pytest.mark.parametrize("kind", ["phi3", "qwen2", "mistral"])
def test_a_plain_draft_is_what_its_architecture_says_whatever_its_model_type(kind, tmp_path):
    folder = write_peer("specforge", tmp_path / "draft", weights(tmp_path), CONFIG | {"model_type": kind})
    assert read_draft(folder).spec == SPEC


def test_a_full_vocabulary_in_the_form_of_eagles_authors(tmp_path):
    spec = dataclasses.replace(SPEC, draft_vocab=40)
    folder = write_peer("eagle", tmp_path / "draft", weights(tmp_path, spec), CONFIG | {"draft_vocab_size": 40})
    draft = read_draft(folder, Hints(aux_layers=(2, 4, 5)))
    assert draft.spec == spec
    np.testing.assert_array_equal(draft.draft_to_target_D, np.arange(40))


def test_model_optimizers_missing_last_norm_and_automodels_carried_norm(tmp_path):
    tensors = weights(tmp_path)
    nested = json.loads((write_peer("model_optimizer", tmp_path / "a", tensors, CONFIG) / "config.json").read_text())
    changed = nested["eagle_config"] | {"use_last_layernorm": False}
    folder = write_peer("model_optimizer", tmp_path / "b", tensors, CONFIG, eagle_config=changed)
    assert read_draft(folder).spec == dataclasses.replace(SPEC, head_norm=False)
    folder = write_peer("automodel", tmp_path / "c", tensors, CONFIG, norm_output=True)
    assert read_draft(folder, Hints(aux_layers=(2, 4, 5))).spec == dataclasses.replace(SPEC, carry_normed=True)


REFUSED = {
    "first norm": ("model_optimizer", {"use_input_layernorm_in_first_layer": False}, "use_input_layernorm"),
    "mtp norm": ("model_optimizer", {"use_mtp_layernorm": True}, "use_mtp_layernorm"),
    "parallel": ("model_optimizer", {"parallel_draft_step": 4}, "parallel_draft_step"),
    "later layers": ("model_optimizer", {"next_layer_regular": False}, "next_layer_regular"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_unsupported_switch_of_a_known_trainer_is_refused_by_name(fault, tmp_path):
    peer, changed, named = REFUSED[fault]
    folder = write_peer(peer, tmp_path / "draft", weights(tmp_path), CONFIG)
    edit_config(folder, lambda config: config["eagle_config"].update(changed))
    with pytest.raises(UserError, match=named):
        open_draft_folder(folder)


def test_a_parallel_draft_of_automodel_is_refused(tmp_path):
    folder = write_peer("automodel", tmp_path / "draft", weights(tmp_path), CONFIG, parallel_drafting=True)
    with pytest.raises(UserError, match="parallel_drafting"):
        open_draft_folder(folder)


def test_an_older_eagle_is_refused(tmp_path):
    tensors = {name: a for name, a in weights(tmp_path).items() if "hidden_norm" not in name}
    folder = write_peer("eagle", tmp_path / "draft", tensors, CONFIG)
    with pytest.raises(UserError, match="architectures"):
        read_draft(folder, Hints(aux_layers=(2, 4, 5)))


def test_parts_are_one_draft_and_a_missing_part_is_refused(tmp_path):
    tensors = weights(tmp_path)
    folder = write_peer("eagle", tmp_path / "draft", tensors, CONFIG)
    named = {name.replace("layers.0.", "midlayer."): a for name, a in tensors.items()}
    (folder / "pytorch_model.bin").unlink()
    half = sorted(named)[:7]
    first = {name: named[name] for name in half}
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(torch_file(first))
    with pytest.raises(UserError, match="1 of 2 parts"):
        open_draft_folder(folder)
    rest = {name: array for name, array in named.items() if name not in half}
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(torch_file(rest))
    assert read_draft(folder, Hints(aux_layers=(2, 4, 5))).spec == SPEC


SU = {"type": "su", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]}


def test_missing_fields_of_longrope_are_completed_as_in_transformers(tmp_path):
    """The scaling has its older name; its length stands outside it (as Phi-3 writes it) or is missing."""
    tensors = weights(tmp_path)
    given = write_peer(
        "specforge", tmp_path / "a", tensors, CONFIG, rope_scaling=SU, original_max_position_embeddings=1024
    )
    rope = read_draft(given).spec.rope.scaling_dict
    assert (rope["rope_type"], rope["original_max_position_embeddings"], rope["factor"]) == ("longrope", 1024, 4.0)
    derived = write_peer("specforge", tmp_path / "b", tensors, CONFIG, rope_scaling=SU)
    rope = read_draft(derived).spec.rope.scaling_dict
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
def test_a_rope_scaling_without_a_needed_number_is_refused(fault, tmp_path):
    scaling, named = ROPES[fault]
    folder = write_peer("specforge", tmp_path / "draft", weights(tmp_path), CONFIG, rope_scaling=scaling)
    with pytest.raises(UserError, match=named):
        read_draft(folder)
