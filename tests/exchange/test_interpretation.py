"""What a published draft leaves open gives one interpretation for each possible answer."""

import dataclasses

import pytest

from jeagle.errors import UserError
from jeagle.exchange import Hints, Interpretation, interpretations, open_draft_folder
from tests.exchange.drafts import PLAIN, edit_config, to_sglang
from tests.exchange.peers import CONFIG, SPEC, weights, write_peer


def answers(folder, target_layers, **hints):
    return [
        (each.answers, each.spec) for each in interpretations(open_draft_folder(folder), Hints(**hints), target_layers)
    ]


@pytest.mark.parametrize("peer", ["specforge", "sglang", "speculators", "model_optimizer"])
def test_a_trainers_own_convention_leaves_no_question_open(peer, tmp_path):
    folder = write_peer(peer, tmp_path / "draft", weights(tmp_path), CONFIG)
    assert answers(folder, None) == [({}, SPEC)]


def test_with_a_target_the_layer_ids_plus_one_are_measured_too(tmp_path):
    tensors = weights(tmp_path)
    nested = answers(write_peer("specforge", tmp_path / "a", tensors, CONFIG), 8)
    assert [a for a, _ in nested] == [{"aux_layers": (2, 4, 5)}, {"aux_layers": (1, 3, 4)}]
    top = answers(write_peer("speculators", tmp_path / "b", tensors, CONFIG), 8)
    assert [a for a, _ in top] == [{"aux_layers": (2, 4, 5)}, {"aux_layers": (3, 5, 6)}]
    assert answers(to_sglang(SPEC, tmp_path / "ours"), 8) == [({}, SPEC)]


def test_without_layer_ids_the_user_or_a_target_is_needed(tmp_path):
    folder = write_peer("eagle", tmp_path / "draft", weights(tmp_path), CONFIG)
    with pytest.raises(UserError, match="--aux-layers"):
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


def test_the_residual_is_open_where_speculators_layout_lacks_the_field(tmp_path):
    folder = write_peer("speculators", tmp_path / "draft", weights(tmp_path), CONFIG)
    edit_config(folder, lambda config: config.pop("norm_before_residual"))
    assert [spec.norm_before_residual for _, spec in answers(folder, None)] == [False, True]
    assert answers(folder, None, norm_before_residual=True)[0][1].norm_before_residual
    both = answers(folder, 8)
    assert len(both) == 4 and len({spec for _, spec in both}) == 4


def test_two_lists_that_contradict_each_other_are_two_interpretations(tmp_path):
    folder = to_sglang(SPEC, tmp_path / "draft")
    edit_config(folder, lambda c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[2, 4, 5]))
    assert [a["aux_layers"] for a, _ in answers(folder, None)] == [(2, 4, 5), (3, 5, 6)]


def test_an_interpretation_is_described_in_words_and_flags():
    answers = {"aux_layers": (2, 4, 5), "norm_output": "head", "norm_before_residual": True}
    interpretation = Interpretation(answers, PLAIN)
    assert interpretation.describe() == "aux_layers 2 4 5, norm_output head, norm_before_residual true"
    assert interpretation.flags() == "--aux-layers and --norm-output and --norm-before-residual"
    assert Interpretation({}, PLAIN).describe() == "as its files say"
