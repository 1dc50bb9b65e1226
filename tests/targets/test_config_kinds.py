"""A field of config.json of the wrong kind is named: never a traceback, never another file's fault, never ignored."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from jeagle import targets
from jeagle.errors import UserError
from jeagle.layers.rope import inverse_frequencies
from jeagle.targets.checkpoint.reference import TargetFiles
from jeagle.targets.families import common
from jeagle.targets.families.kinds import KINDS, SECTIONS, check_kinds
from tests import tiny

HERE = Path(__file__).parent
PUBLISHED = {name: entry["config"] for name, entry in json.loads((HERE / "published.json").read_text()).items()}
GOLDENS = {path.parent.name: json.loads(path.read_text()) for path in sorted((HERE / "goldens").glob("*/config.json"))}
VALUES = (7, -1, 0, 1.5, math.nan, math.inf, True, False, "7", "", [1], ["x"], [], [None], {"a": 1}, {})


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def test_every_field_that_a_family_reads_has_a_kind(monkeypatch):
    read, get = set(), common.Switches.get

    def recorded(switches: common.Switches, name: str, default: Any = None) -> Any:
        read.add(name)
        return get(switches, name, default)

    monkeypatch.setattr(common.Switches, "get", recorded)
    for config in (*PUBLISHED.values(), *GOLDENS.values()):
        config = {name: value for name, value in config.items() if name != "quantization_config"}
        targets.read_spec(copy.deepcopy(config))
    assert read and not read - set(KINDS)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_files_have_these_kinds(model):
    check_kinds(PUBLISHED[model])


def wrong(field: str) -> list[Any]:
    return [value for value in VALUES if not KINDS[field][1](value)]


@pytest.mark.parametrize("model", list(PUBLISHED)[::7])
def test_a_wrong_kind_is_named_wherever_the_field_is(model):
    """Each field of a published file in turn, in the file and in its sections, also those that it does not have."""
    config = PUBLISHED[model]
    for field in KINDS:
        for value in wrong(field):
            changed = copy.deepcopy(config)
            text_part(changed)[field] = value
            with pytest.raises(UserError, match=rf"config\.json has (text_config\.)?{field} = .*; it must be "):
                targets.read_spec(changed)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_no_object_is_named_and_so_are_its_fields(section):
    for value in (v for v in VALUES if not isinstance(v, dict)):
        with pytest.raises(UserError, match=f"has {section} = .*; it must be an object"):
            targets.read_spec(tiny.config_json(320) | {section: value})
    for inner in ("full_attention.factor", "factor"):
        *kind, name = inner.split(".")
        nested = {kind[0]: {name: "8"}} if kind else {name: "8"}
        with pytest.raises(UserError, match=rf"has {section}\.{inner} = '8'; it must be a number above 0"):
            targets.read_spec(tiny.config_json(320) | {section: nested})


def outcome(config: dict[str, Any]) -> Any:
    """What a config.json means: a spec, or the sentence that refuses it."""
    try:
        return targets.read_spec(config)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("field", sorted(tiny.config_json(320)))
def test_null_is_as_good_as_absent_or_is_named(field):
    found = outcome(tiny.config_json(320) | {field: None})
    if isinstance(found, str):
        assert field in found or field == "architectures"
    else:
        assert found.rope.theta == 10000.0 and found.vocab == 320


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "beta_fast": 32},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_scaling_with_a_null_in_it_is_named_or_has_angles(kind):
    """What is missing is computed from other fields, or named; the angles never fail later, nor are they plain."""
    for field in SCALINGS[kind]:
        found = outcome(tiny.config_json(320, rope_scaling=SCALINGS[kind] | {field: None}))
        if isinstance(found, str):
            assert field in found or field in ("type", "rope_type")
        else:
            assert inverse_frequencies(found.rope, 8).shape == (4,) and found.rope.scaling


@pytest.mark.parametrize("scaling", [{"factor": 8.0}, {"type": None, "factor": 8.0}, {"low_freq_factor": 1.0}])
def test_a_scaling_without_a_type_is_not_plain_rope(scaling):
    with pytest.raises(UserError, match="in its rope_scaling, which names no rope_type"):
        targets.read_spec(tiny.config_json(320, rope_scaling=scaling))
    assert targets.read_spec(tiny.config_json(320, rope_scaling={"rope_type": "default"})).rope.theta == 10000.0


FIELDS_OF_THE_FILE = {
    "rope_scaling": "8",
    "hidden_size": "32",
    "vocab_size": [320],
    "text_config": "none",
    "architectures": "LlamaForCausalLM",
    "model_type": 7,
    "quantization_config": [],
    "eos_token_id": "<|im_end|>",
}


@pytest.mark.parametrize("field", FIELDS_OF_THE_FILE)
@pytest.mark.parametrize("opened", ["tokenizer", "weights"])
def test_config_json_is_blamed_whoever_reads_it_first(tmp_path, opened, field):
    folder = tiny.write_target(tmp_path / "target", **{field: FIELDS_OF_THE_FILE[field]})
    files = TargetFiles("target", folder, "safetensors", "")
    read = targets.load_tokenizer if opened == "tokenizer" else targets.open_weights
    with pytest.raises(UserError, match=rf"config\.json has {field} = .*; it must be"):
        read(files)


def test_config_json_is_blamed_for_what_only_transformers_reads(tmp_path):
    folder = tiny.write_target(tmp_path / "target", initializer_range="wide", output_hidden_states=[1])
    with pytest.raises(UserError, match=r"target/config\.json cannot be read .*initializer_range"):
        targets.load_tokenizer(TargetFiles("target", folder, "safetensors", ""))


def test_generation_config_json_is_named_too(tmp_path):
    folder = tiny.write_target(tmp_path / "target")
    (folder / "generation_config.json").write_text('{"eos_token_id": ["<|im_end|>"]}')
    with pytest.raises(UserError, match=r"generation_config\.json has eos_token_id = .*a list of token ids"):
        targets.open_weights(TargetFiles("target", folder, "safetensors", ""))
