"""What a run's draft is: derived, from a file, from an older draft; and what is refused before training."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import exchange
from jeagle import flags as configs
from jeagle.config import DataConfig, DraftConfig, ObjectiveConfig, RunConfig, TargetConfig
from jeagle.drafts import Eagle3
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec, Rope
from jeagle.objective import ObjectiveSpec
from jeagle.run import assemble, dataset
from jeagle.run.draft_init import (
    SHAPE,
    SWITCHES,
    Start,
    check_engines,
    draft_class,
    draft_spec,
    own_embedding,
    starting_head,
)
from jeagle.runtime.manifest import write_manifest
from tests.exchange.drafts import CARD, LAYERS, PLAIN, parameters, to_sglang

TARGET = type("Target", (), {})()
for name, value in {
    "width": 24, "vocab": 40, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_width": 28, "norm_eps": 1e-6,
    "rope": Rope(5e5), "max_positions": 512, "layers": LAYERS,
}.items():  # fmt: skip
    setattr(TARGET, name, value)


def spec_of(start=None, aux_layers=(), ends=(2,), **draft):
    config = RunConfig(name="x", target=TargetConfig(aux_layers=aux_layers), draft=DraftConfig(vocab=16, **draft))
    return draft_spec(config, TARGET, 16, ends, start)


def test_a_draft_is_the_targets_block_unless_told_otherwise():
    spec = spec_of()
    assert (spec.width, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp_width) == (24, 4, 2, 6, 28)
    assert (spec.aux_layers, spec.rope, spec.norm_eps, spec.end_token_ids) == ((2, 4, 5), Rope(5e5), 1e-6, (2,))
    assert exchange.sglang_limits(spec, LAYERS) == [] and exchange.vllm_limits(spec, "plain") == []


SETTINGS = {
    "layers": 2, "width": 16, "heads": 8, "kv_heads": 4, "head_dim": 10, "mlp_width": 9, "norm_before_residual": True,
    "norm_before_fc": True, "fc_norm": True, "carry_normed": True, "head_norm": False, "qk_norm": True,
    "attention_bias": True, "sliding_window": 5,
    "layer_types": ("full_attention",),
}  # fmt: skip


def test_settings_and_spec_have_the_same_switches_with_the_same_defaults():
    """They are written down twice, with another docstring each: a switch that one of them lacks would do nothing."""
    settings, spec = (
        {field.name: field.default for field in dataclasses.fields(kind)} for kind in (DraftConfig, DraftSpec)
    )
    assert settings.keys() & spec.keys() == {*SHAPE, *SWITCHES} == SETTINGS.keys()
    assert {name: settings[name] for name in SWITCHES} == {name: spec[name] for name in SWITCHES}
    learnt = {field.name for field in dataclasses.fields(ObjectiveConfig)} - {"dialect"}
    assert learnt == {field.name for field in dataclasses.fields(ObjectiveSpec)}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_switch_reaches_the_spec_and_no_other(name):
    assert spec_of(**{name: SETTINGS[name]}) == dataclasses.replace(spec_of(), **{name: SETTINGS[name]})


def test_any_number_of_taps():
    assert spec_of(aux_layers=(1, 2, 3, 5, 7)).aux_layers == (1, 2, 3, 5, 7)


SPECFORGE = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 30,
    "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
    "vocab_size": 40, "draft_vocab_size": 16, "max_position_embeddings": 256, "rope_theta": 7e4, "norm_output": True,
}  # fmt: skip
SPECULATORS = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 16,
    "norm_before_residual": True, "norm_before_fc": True, "norm_output": True,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 5, 7],
    "transformer_layer_config": {
        "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 30, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-6, "vocab_size": 40,
        "max_position_embeddings": 256, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
}  # fmt: skip


def test_a_configuration_in_specforges_form(tmp_path):
    (tmp_path / "draft.json").write_text(json.dumps(SPECFORGE))
    spec = spec_of(json=str(tmp_path / "draft.json"))
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.mlp_width, spec.rope) == (4, 1, 6, 30, Rope(7e4))
    assert (spec.aux_layers, spec.norm_eps, spec.max_positions) == ((2, 4, 5), 1e-5, 256)
    assert spec.head_norm and not spec.carry_normed  # their norm_output stands before lm_head
    assert spec_of(json=str(tmp_path / "draft.json"), norm_output="carry").carry_normed
    (tmp_path / "draft.json").write_text(json.dumps(SPECFORGE | {"eagle_aux_hidden_state_layer_ids": [1, 6]}))
    assert spec_of(json=str(tmp_path / "draft.json")).aux_layers == (1, 6)


OF_THE_TARGET = {  # what SpecForge's files keep of the target, and neither it nor an engine reads of a draft
    "phi3": {"model_type": "phi3", "tie_word_embeddings": True, "attention_bias": False, "pad_token_id": 3},
    "qwen2": {"model_type": "qwen2", "max_window_layers": 28, "sliding_window": 32, "use_sliding_window": False,
              "use_mrope": False, "rope_scaling": None},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "gemma": {"target_model_type": "gemma3_text", "sliding_window": 8, "use_sliding_window": False},
    "qwen3_next": {"decoder_sparse_step": 1, "use_sliding_window": False, "attention_dropout": 0.0, "use_cache": True},
}  # fmt: skip


@pytest.mark.parametrize("target", OF_THE_TARGET)
def test_specforges_files_for_other_families_describe_the_same_layers(tmp_path, target):
    for name, tree in (("llama", SPECFORGE), (target, SPECFORGE | OF_THE_TARGET[target])):
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    assert spec_of(json=str(tmp_path / f"{target}.json")) == spec_of(json=str(tmp_path / "llama.json"))


def test_a_configuration_in_speculators_form(tmp_path):
    (tmp_path / "draft.json").write_text(json.dumps(SPECULATORS))
    spec = spec_of(json=str(tmp_path / "draft.json"))
    assert (spec.width, spec.target_width, spec.layers, spec.aux_layers) == (16, 24, 2, (1, 3, 5, 7))
    assert spec.qk_norm and spec.norm_before_residual and spec.norm_before_fc and spec.carry_normed


WRONG_FILES = {
    "another target": ({"vocab_size": 41}, "this one has"),
    "another vocabulary": ({"draft_vocab_size": 12}, "--draft.vocab 12"),
    "heads": ({"num_key_value_heads": 3}, "multiple"),
    "no such activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "nothing": ({"architectures": ["Other"]}, "architectures"),
}


@pytest.mark.parametrize(("change", "said"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_configuration_that_cannot_be_is_refused(tmp_path, change, said):
    (tmp_path / "draft.json").write_text(json.dumps(SPECFORGE | change))
    with pytest.raises(UserError, match=said):
        spec_of(json=str(tmp_path / "draft.json"))
    with pytest.raises(UserError, match="--draft.heads"):
        spec_of(json=str(tmp_path / "draft.json"), heads=2)


@pytest.mark.parametrize(
    ("draft", "flag", "engine"),
    [
        ({"norm_before_residual": True}, "norm_before_residual", "SGLang"),
        ({"layers": 2}, "layers", "SGLang"),
        ({"qk_norm": True}, "qk_norm", "SGLang"),
        ({"sliding_window": 5}, "sliding_window", "SGLang"),
        (
            {"layers": 2, "sliding_window": 5, "layer_types": ("full_attention", "sliding_attention")},
            "sliding_window",
            "SGLang",
        ),
        ({"head_norm": False, "engines": ("vllm",)}, "head_norm", "vLLM"),
        ({"module": "tests.test_starting:Mine"}, "your own", "SGLang"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused_unless_it_is_left_out(draft, flag, engine):
    config = DraftConfig(**draft)
    spec = spec_of(**{name: value for name, value in draft.items() if name not in ("engines", "module")})
    with pytest.raises(UserError, match=f"{engine}.*{flag}.*--draft.engines"):
        check_engines(config, spec, LAYERS)
    check_engines(dataclasses.replace(config, engines=()), spec, LAYERS)


class Mine(Eagle3):
    """A draft of one's own."""


def test_a_draft_of_ones_own():
    assert draft_class(DraftConfig()) is Eagle3
    assert draft_class(DraftConfig(module=f"{__name__}:Mine")).__doc__ == Mine.__doc__
    for wrong, said in ((f"{__name__}:Yours", "cannot be imported"), ("json:JSONDecoder", "fuse"), ("json", "import")):
        with pytest.raises(UserError, match=said):
            draft_class(DraftConfig(module=wrong))


@pytest.fixture
def exported(tmp_path):
    """A folder with a draft for SGLang: another width than the target's, with an embedding of its own."""
    spec = dataclasses.replace(PLAIN, width=16, fc_norm=True)
    params, ids = parameters(spec), np.arange(0, 32, 2)
    embed = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    out = to_sglang(spec, tmp_path / "old", params=params, ids=ids, card=CARD, embed_VW=embed)
    return out, spec, params, ids, embed


def test_a_start_from_a_drafts_folder_carries_all_of_it(exported, tmp_path):
    out, spec, params, ids, embed = exported
    config = RunConfig(name="x", draft=DraftConfig(vocab=16, start=str(out)))
    start = assemble.open_start(config)
    assert draft_spec(config, TARGET, 16, (2,), start) == spec
    for name, array in params.items():
        np.testing.assert_array_equal(start.params[name], array)
    np.testing.assert_array_equal(own_embedding(tmp_path, spec, jnp.zeros((40, 24)), start), embed)
    kept = dataset.room.load_given_vocabulary(out, 16, 40, (2,))
    np.testing.assert_array_equal(kept, ids)
    twice = dataclasses.replace(config, draft=dataclasses.replace(config.draft, fc_norm=True))
    with pytest.raises(UserError, match="--draft.fc-norm"):
        draft_spec(twice, TARGET, 16, (2,), start)
    with pytest.raises(UserError, match="no folder"):
        assemble.open_start(RunConfig(name="x", draft=DraftConfig(start=str(tmp_path / "nothing"))))


def test_an_embedding_that_engines_would_replace_is_refused(tmp_path):
    theirs = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    start = Start(PLAIN, {}, theirs)
    assert own_embedding(tmp_path, PLAIN, jnp.asarray(theirs), start) is None
    with pytest.raises(UserError, match="replace"):
        own_embedding(tmp_path, PLAIN, jnp.asarray(theirs[::-1]), start)


def test_another_width_has_an_embedding_that_keeps_distances_and_a_head_of_noise(tmp_path):
    target_VH = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    spec = dataclasses.replace(PLAIN, width=256)
    ours_VW = np.asarray(own_embedding(tmp_path, spec, jnp.asarray(target_VH)))
    between = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(40, 1)]  # noqa: E731
    scale = between(ours_VW) / between(target_VH)
    assert scale.std() / scale.mean() < 0.15
    np.testing.assert_array_equal(ours_VW, own_embedding(tmp_path, spec, jnp.asarray(target_VH)))
    assert starting_head(DraftConfig(), spec, TARGET, None) is None


WRONG_CONFIGS = {
    "lora alone": (["--draft.lora", "4"], "--draft.start"),
    "two descriptions": (["--draft.json", "a", "--draft.start", "b"], "leave one out"),
    "negative": (["--draft.width", "-1"], "0 or above"),
    "parts": (["--train.batch-rows", "6", "--train.accumulate", "4"], "divide"),
    "ema": (["--train.ema", "1.0"], "share"),
    "two averages": (["--train.ema", "0.9", "--train.optimizer", "schedule_free"], "leave one out"),
}


@pytest.mark.parametrize(("flags", "said"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_settings_that_contradict_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        configs.parse_overrides(RunConfig(name="x"), flags, program="x", description="x")


def test_the_vocabulary_of_a_draft_to_start_from_is_kept(exported, tmp_path, monkeypatch):
    """Without --data.vocabulary the map comes from the draft, whatever the data's counts say."""
    out, *_, ids, _ = exported
    (tmp_path / "data" / "train").mkdir(parents=True)
    np.save(tmp_path / "data" / "train" / "counts.npy", np.arange(40))
    write_manifest(tmp_path / "data", {"made_from": {}, "statistics": {}})
    config = RunConfig(name=tmp_path.name, runs=str(tmp_path.parent), data=DataConfig(), draft=DraftConfig(vocab=16))
    made_from = {"end_token_ids": [2], "target_vocab": 40}
    own = dataset._make_tables(config, made_from, tmp_path / "data")
    assert not np.array_equal(dataset.room.load_tables(own), ids)
    config = dataclasses.replace(config, draft=dataclasses.replace(config.draft, start=str(out)))
    np.testing.assert_array_equal(
        dataset.room.load_tables(dataset._make_tables(config, made_from, tmp_path / "data")), ids
    )
    another = np.arange(16) + (np.arange(16) > 8)  # end token 2 among them
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own" / "d2t.npy", another - np.arange(16))
    np.save(tmp_path / "own" / "t2d.npy", np.isin(np.arange(40), another))
    other = dataclasses.replace(config, data=DataConfig(vocabulary=str(tmp_path / "own")))
    with pytest.raises(UserError, match="not the vocabulary of the draft to start from"):
        dataset._make_tables(other, made_from, tmp_path / "data")
