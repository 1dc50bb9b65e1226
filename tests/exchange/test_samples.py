"""Drafts that speculators itself wrote are read, and written back with equal tensors."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from jeagle.exchange import ExportCard, read_draft
from jeagle.interfaces import DraftSpec
from tests.exchange.drafts import config_in, edit_config, tensors_in, to_vllm

SAMPLES = Path(__file__).parent / "samples"
SHARED = {
    "target_width": 32,
    "width": 32,
    "target_vocab": 96,
    "aux_layers": (2, 4, 5),
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 64,
    "max_positions": 128,
}
DRAFTS = {
    "ckpt_a_default_bf16": (
        "bfloat16",
        DraftSpec(
            **SHARED,
            draft_vocab=48,
            norm_before_residual=True,
            norm_before_fc=True,
            carry_normed=True,
            sliding_window=2048,
            end_token_ids=(2,),
        ),
    ),
    "ckpt_b_qwen3_fp32": ("float32", DraftSpec(**SHARED, draft_vocab=96, layers=2, fc_norm=True, qk_norm=True)),
}
CARD = ExportCard(target_ref="tiny-llama-verifier", target_architectures=("LlamaForCausalLM",))


def write_again(draft, out, **settings):
    ids = draft.draft_to_target_D
    return to_vllm(draft.spec, out, params=draft.params, ids=ids, target_layers=8, card=CARD, **settings)


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_of_speculators_is_read_as_its_config_says(name):
    draft = read_draft(SAMPLES / name)
    assert draft.spec == DRAFTS[name][1]
    assert draft.embed_VW.shape == (96, 32)
    assert (np.diff(draft.draft_to_target_D) > 0).all()


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_of_speculators_is_written_back_byte_for_byte(name, tmp_path):
    draft, (dtype, _) = read_draft(SAMPLES / name), DRAFTS[name]
    out = write_again(draft, tmp_path / "draft", dtype=dtype, embed_VW=draft.embed_VW)
    ours, theirs = tensors_in(out), tensors_in(SAMPLES / name)
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        assert ours[tensor].dtype == theirs[tensor].dtype, tensor
        assert ours[tensor].shape == theirs[tensor].shape, tensor
        assert ours[tensor].tobytes() == theirs[tensor].tobytes(), tensor


def test_layer_types_of_a_two_layer_draft_of_speculators_are_read_and_written_back(tmp_path):
    written = shutil.copytree(SAMPLES / "ckpt_b_qwen3_fp32", tmp_path / "theirs")
    types = ["sliding_attention", "full_attention"]
    edit_config(written, lambda c: c["transformer_layer_config"].update(layer_types=types, sliding_window=2048))
    draft = read_draft(written)
    assert (draft.spec.windows, draft.spec.layer_types) == ((2048, 0), tuple(types))
    out = write_again(draft, tmp_path / "ours", embed_VW=draft.embed_VW)
    decoder = config_in(out)["transformer_layer_config"]
    assert (decoder["layer_types"], decoder["sliding_window"]) == (types, 2048)
    assert read_draft(out).spec == draft.spec


@pytest.mark.parametrize("name", DRAFTS)
def test_our_config_says_what_speculators_own_says(name, tmp_path):
    """Every field that shapes the draft has the value that the library wrote."""
    draft, theirs = read_draft(SAMPLES / name), config_in(SAMPLES / name)
    ours = config_in(write_again(draft, tmp_path / "draft", dtype="bfloat16"))
    flags = [
        "draft_vocab_size",
        "eagle_aux_hidden_state_layer_ids",
        "fc_norm",
        "norm_before_fc",
        "norm_before_residual",
    ]
    for field in [*flags, "norm_output", "speculators_model_type", "tie_word_embeddings"]:
        assert ours[field] == theirs[field], field
    decoder = ours["transformer_layer_config"]
    silent = {"attention_dropout", "bos_token_id", "initializer_range", "max_window_layers", "pad_token_id"}
    silent |= {"pretraining_tp", "use_cache"}
    for field, value in theirs["transformer_layer_config"].items():
        if field not in silent:
            assert decoder[field] == value, field
    assert ours["speculators_config"]["verifier"] == theirs["speculators_config"]["verifier"]
    method = theirs["speculators_config"]["proposal_methods"][0]
    assert ours["speculators_config"]["proposal_methods"][0].keys() == method.keys()
