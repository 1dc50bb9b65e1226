"""A draft that would be stored or served wrongly is refused, and an export replaces nothing but an older export."""

import dataclasses
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jeagle.errors import UserError
from jeagle.exchange import ExportCard, read_draft
from tests.exchange.drafts import (
    CARD,
    FULL,
    LAYERS,
    PLAIN,
    SLIDING,
    embedding,
    parameters,
    target_ids,
    to_sglang,
    to_vllm,
)

UNSERVED_BY_SGLANG = {
    "norm_before_residual": {"norm_before_residual": True},
    "qk_norm": {"qk_norm": True},
    "attention_bias": {"attention_bias": True},
    "head_norm": {"head_norm": False},
    "layers is 2": {"layers": 2},
    "sliding_window": {"sliding_window": 8},
    "layers is 2.*sliding_window": {"layers": 2, "sliding_window": 8, "layer_types": (FULL, SLIDING)},
    f"aux_layers contains {LAYERS}": {"aux_layers": (2, 4, LAYERS)},
    "aux_layers contains 0": {"aux_layers": (0, 2, 4)},
}
UNSERVED_BY_VLLM = {
    ("plain", "qk_norm"): {"qk_norm": True},
    ("plain", "head_norm"): {"head_norm": False},
    ("speculators", "head_norm"): {"head_norm": False},
    ("speculators", "bias of o_proj"): {"qk_norm": True, "attention_bias": True},
}
WITHOUT_AUX_HIDDEN_STATES = {"SGLang": "GraniteForCausalLM", "vLLM": "Gemma3ForCausalLM"}
IMPOSSIBLE = {
    "aux layers": [
        {"aux_layers": ()},
        {"aux_layers": (4, 2)},
        {"aux_layers": (2, 2)},
        {"aux_layers": (-1, 2)},
        {"aux_layers": (2, LAYERS + 1)},
    ],
    "vocabulary": [{"draft_vocab": 41}],
    "exclude each other": [{"norm_before_fc": True, "fc_norm": True}],
    "1 layer_types for 2 layers": [{"layers": 2, "layer_types": (FULL,)}],
    "need each other": [
        {"layers": 2, "layer_types": (FULL, SLIDING)},
        {"layers": 2, "layer_types": (FULL, FULL), "sliding_window": 8},
    ],
}


@pytest.mark.parametrize("named", UNSERVED_BY_SGLANG)
def test_a_draft_that_sglang_would_serve_wrongly_is_refused(named, tmp_path):
    spec = dataclasses.replace(PLAIN, **UNSERVED_BY_SGLANG[named])
    with pytest.raises(UserError, match=f"SGLang.*{named}"):
        to_sglang(spec, tmp_path / "draft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layout", "named"), UNSERVED_BY_VLLM)
def test_a_draft_that_vllm_would_serve_wrongly_is_refused(layout, named, tmp_path):
    spec = dataclasses.replace(PLAIN, **UNSERVED_BY_VLLM[layout, named])
    with pytest.raises(UserError, match=f"vLLM.*{named}"):
        to_vllm(spec, tmp_path / "draft", layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", WITHOUT_AUX_HIDDEN_STATES)
def test_a_target_without_aux_hidden_states_in_the_engine_is_refused(engine, tmp_path):
    card = ExportCard(target_ref="a/b", target_architectures=(WITHOUT_AUX_HIDDEN_STATES[engine],))
    to_engine = {"SGLang": to_sglang, "vLLM": to_vllm}[engine]
    with pytest.raises(UserError, match=f"{engine}.*{WITHOUT_AUX_HIDDEN_STATES[engine]}"):
        to_engine(PLAIN, tmp_path / "draft", card=card)
    assert not list(tmp_path.iterdir())
    other = {"SGLang": to_vllm, "vLLM": to_sglang}[engine]
    assert other(PLAIN, tmp_path / "draft", card=card).is_dir()


@pytest.mark.parametrize(("named", "changes"), [(named, c) for named, cs in IMPOSSIBLE.items() for c in cs])
def test_an_impossible_draft_is_refused_for_every_engine(named, changes, tmp_path):
    spec = dataclasses.replace(PLAIN, **changes)
    with pytest.raises(UserError, match=named):
        to_sglang(spec, tmp_path / "draft")
    with pytest.raises(UserError, match=named):
        to_vllm(spec, tmp_path / "draft")


def test_speculators_layout_needs_to_know_the_target(tmp_path):
    with pytest.raises(UserError, match="names the target"):
        to_vllm(PLAIN, tmp_path / "draft", card=ExportCard())
    assert to_vllm(PLAIN, tmp_path / "draft", card=ExportCard(), layout="plain").is_dir()


@pytest.mark.parametrize("name", sorted(parameters(PLAIN)))
@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "infinity"])
def test_a_broken_parameter_is_named(name, fault, tmp_path):
    params = parameters(PLAIN)
    if fault == "missing":
        del params[name]
    elif fault == "shape":
        params[name] = params[name][..., :-1]
    else:
        params[name].flat[-1] = np.nan if fault == "nan" else -np.inf
    with pytest.raises(UserError, match=re.escape(name)):
        to_sglang(PLAIN, tmp_path / "draft", params=params)
    assert not list(tmp_path.iterdir())


def test_an_unknown_parameter_is_named(tmp_path):
    params = parameters(PLAIN) | {"layers.0.self_attn.q_norm": np.ones(6, np.float32)}
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_norm"):
        to_sglang(PLAIN, tmp_path / "draft", params=params)


@pytest.mark.parametrize(
    "ids",
    [
        target_ids(PLAIN)[::-1],
        np.minimum(target_ids(PLAIN), 20),
        target_ids(PLAIN) - np.arange(16),
        target_ids(PLAIN) + 40 - target_ids(PLAIN)[-1],
        target_ids(PLAIN) - target_ids(PLAIN)[0] - 1,
        target_ids(PLAIN)[:-1],
        target_ids(PLAIN).astype(np.float32),
    ],
    ids=["falling", "repeated", "offsets", "above V", "negative", "too few", "not whole"],
)
def test_an_invalid_map_of_ids_is_refused(ids, tmp_path):
    with pytest.raises(UserError, match="map of ids"):
        to_sglang(PLAIN, tmp_path / "draft", ids=ids)


def test_a_reduced_vocabulary_needs_a_map(tmp_path):
    with pytest.raises(UserError, match=r"16 entries of the target's 40.*d2t"):
        to_sglang(PLAIN, tmp_path / "draft", ids=None)


def test_another_width_needs_an_embedding_that_fits(tmp_path):
    narrow = dataclasses.replace(PLAIN, target_width=20)
    with pytest.raises(UserError, match=r"embed_tokens\.weight is missing"):
        to_sglang(narrow, tmp_path / "draft")
    for wrong in (embedding(narrow)[:, :20], embedding(narrow)[1:], np.full_like(embedding(narrow), np.nan)):
        with pytest.raises(UserError, match=r"embed_tokens\.weight"):
            to_sglang(narrow, tmp_path / "draft", embed_VW=wrong)


def test_an_own_embedding_that_sglang_would_replace_is_refused(tmp_path):
    rows = np.zeros((40, 24), np.float32)
    with pytest.raises(UserError, match="SGLang.*embedding"):
        to_sglang(PLAIN, tmp_path / "draft", embed_VW=rows, target_embed_VW=rows + 1)


def test_numbers_beyond_float16_are_refused(tmp_path):
    params = parameters(PLAIN)
    params["fc"][0, 0] = 70000.0
    with pytest.raises(UserError, match=r"fc\.weight.*float16"):
        to_sglang(PLAIN, tmp_path / "draft", params=params, dtype="float16")
    assert to_sglang(PLAIN, tmp_path / "draft", params=params, dtype="bfloat16").is_dir()
    with pytest.raises(UserError, match="float64"):
        to_sglang(PLAIN, tmp_path / "other", dtype="float64")


def test_an_older_export_is_replaced(tmp_path):
    out = to_sglang(PLAIN, tmp_path / "draft", tokenizer=_tokenizer())
    assert (out / "tokenizer.json").is_file()
    to_sglang(PLAIN, out)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "jeagle_export.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for place in ("work", "file"):
        with pytest.raises(UserError, match=place):
            to_sglang(PLAIN, tmp_path / place)
    assert (tmp_path / "work" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"
    with pytest.raises(UserError, match="cannot be written"):
        to_sglang(PLAIN, tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    assert read_draft(to_sglang(PLAIN, tmp_path / "empty")).spec == PLAIN


def test_a_failed_export_does_not_change_the_older_one(tmp_path):
    out = to_sglang(PLAIN, tmp_path / "draft", dtype="bfloat16")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match="tokenizer"):
        to_sglang(PLAIN, out, tokenizer=tmp_path / "nothing")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_the_same_draft_gives_the_same_bytes(tmp_path):
    one, two = (
        to_sglang(PLAIN, tmp_path / "a" / "draft", card=CARD),
        to_sglang(PLAIN, tmp_path / "b" / "draft", card=CARD),
    )
    for name in ("config.json", "model.safetensors", "jeagle_export.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_tokenizer_may_be_an_object_or_a_folder(tmp_path):
    from_object = to_sglang(PLAIN, tmp_path / "object", tokenizer=_tokenizer())
    from_folder = to_sglang(PLAIN, tmp_path / "folder", tokenizer=from_object)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (from_object / name).read_bytes() == (from_folder / name).read_bytes()
    assert read_draft(from_object).spec == read_draft(from_folder).spec == PLAIN


def _tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
