"""A draft that would be stored or served wrongly is refused by the name of its fault, and nothing is written."""

import dataclasses
import re

import numpy as np
import pytest

from jeagle.errors import UserError
from jeagle.exchange import ExportCard
from tests.exchange.drafts import LAYERS, PLAIN, embedding, parameters, target_ids, to_sglang, to_vllm

UNSERVED_BY_SGLANG = {
    "norm_before_residual": {"norm_before_residual": True},
    "qk_norm": {"qk_norm": True},
    "attention_bias": {"attention_bias": True},
    "head_norm": {"head_norm": False},
    "layers is 2": {"layers": 2},
    "sliding_window": {"sliding_window": 8},
    f"taps holds {LAYERS}": {"aux_layers": (2, 4, LAYERS)},
    "taps holds 0": {"aux_layers": (0, 2, 4)},
}
UNSERVED_BY_VLLM = {
    ("plain", "qk_norm"): {"qk_norm": True},
    ("plain", "head_norm"): {"head_norm": False},
    ("speculators", "head_norm"): {"head_norm": False},
    ("speculators", "bias of o_proj"): {"qk_norm": True, "attention_bias": True},
}
UNTAPPED = {"SGLang": "GraniteForCausalLM", "vLLM": "Gemma3ForCausalLM"}
SENSELESS = {
    "taps": [
        {"aux_layers": ()},
        {"aux_layers": (4, 2)},
        {"aux_layers": (2, 2)},
        {"aux_layers": (-1, 2)},
        {"aux_layers": (2, LAYERS + 1)},
    ],
    "vocabulary": [{"draft_vocab": 41}],
    "exclude each other": [{"norm_before_fc": True, "fc_norm": True}],
}


@pytest.mark.parametrize("named", UNSERVED_BY_SGLANG)
def test_what_sglang_would_serve_wrongly_is_refused(named, tmp_path):
    spec = dataclasses.replace(PLAIN, **UNSERVED_BY_SGLANG[named])
    with pytest.raises(UserError, match=f"SGLang.*{named}"):
        to_sglang(spec, tmp_path / "draft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("layout", "named"), UNSERVED_BY_VLLM)
def test_what_vllm_would_serve_wrongly_is_refused(layout, named, tmp_path):
    spec = dataclasses.replace(PLAIN, **UNSERVED_BY_VLLM[layout, named])
    with pytest.raises(UserError, match=f"vLLM.*{named}"):
        to_vllm(spec, tmp_path / "draft", layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", UNTAPPED)
def test_a_family_that_an_engine_does_not_tap_is_refused(engine, tmp_path):
    card = ExportCard(target_ref="a/b", target_architectures=(UNTAPPED[engine],))
    write = {"SGLang": to_sglang, "vLLM": to_vllm}[engine]
    with pytest.raises(UserError, match=f"{engine}.*{UNTAPPED[engine]}"):
        write(PLAIN, tmp_path / "draft", card=card)
    assert not list(tmp_path.iterdir())
    other = {"SGLang": to_vllm, "vLLM": to_sglang}[engine]
    assert other(PLAIN, tmp_path / "draft", card=card).is_dir()


@pytest.mark.parametrize(("named", "changes"), [(named, c) for named, cs in SENSELESS.items() for c in cs])
def test_a_draft_that_makes_no_sense_is_refused_for_every_engine(named, changes, tmp_path):
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
def test_a_map_that_is_none_is_refused(ids, tmp_path):
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


def test_an_embedding_of_its_own_that_sglang_would_replace_is_refused(tmp_path):
    rows = np.zeros((40, 24), np.float32)
    with pytest.raises(UserError, match="SGLang.*embedding"):
        to_sglang(PLAIN, tmp_path / "draft", embed_VW=rows, target_embed_VW=rows + 1)


def test_numbers_beyond_float16_are_refused_not_made_infinite(tmp_path):
    params = parameters(PLAIN)
    params["fc"][0, 0] = 70000.0
    with pytest.raises(UserError, match=r"fc\.weight.*float16"):
        to_sglang(PLAIN, tmp_path / "draft", params=params, dtype="float16")
    assert to_sglang(PLAIN, tmp_path / "draft", params=params, dtype="bfloat16").is_dir()
    with pytest.raises(UserError, match="float64"):
        to_sglang(PLAIN, tmp_path / "other", dtype="float64")
