"""The doctor reports a planted fault, and nothing for a sound target; comparing with transformers needs torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jeagle import doctor
from jeagle.errors import UserError

GOLDEN = Path(__file__).parent / "targets" / "goldens" / "llama_published"


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_without_torch_one_sentence_says_so(monkeypatch):
    # tyro looks for torch too.
    monkeypatch.setattr(doctor, "parse", lambda *_, **__: doctor.DoctorArguments(str(GOLDEN)))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch.*jeagle\[parity\]"):
        doctor.main(["--target", str(GOLDEN)])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", "0.001"), ("bfloat16", "0.25")])
def test_a_sound_target_passes(torch, capsys, dtype, limit):
    assert doctor.main(["--target", str(GOLDEN), "--against", "transformers", "--dtype", dtype, "--tokens", "21"]) == 0
    out = capsys.readouterr().out
    assert f"Nothing differs beyond {limit}." in out
    assert "greedy tokens equal: 21 of 21" in out
    assert [line.split("  ")[0] for line in out.splitlines()[2:7]] == [
        "embeddings",
        "layer 0",
        "layer 1",
        "final norm",
        "logits",
    ]


@pytest.mark.parametrize(
    ("tensor", "first"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.0.self_attn.k_proj.weight", "layer 0"),
        ("model.layers.1.mlp.up_proj.weight", "layer 1"),
        ("model.norm.weight", "final norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_a_planted_fault_is_named(torch, capsys, monkeypatch, tmp_path, tensor, first):
    sound = tmp_path / "sound"
    shutil.copytree(GOLDEN, sound)
    load = doctor.targets.open_weights

    def faulty(files):
        """jeagle reads a copy with one tensor a little wrong, transformers the sound one."""
        broken = tmp_path / "broken"
        shutil.copytree(sound, broken)
        tensors = load_file(broken / "model.safetensors")
        tensors[tensor] = (tensors[tensor].astype(np.float32) * 1.02).astype(tensors[tensor].dtype)
        save_file(tensors, broken / "model.safetensors")
        return load(doctor.targets.resolve(str(broken)))

    monkeypatch.setattr(doctor.targets, "open_weights", faulty)
    assert doctor.main(["--target", str(sound)]) == 1
    assert capsys.readouterr().out.endswith(f"The first to differ beyond 0.001: {first}.\n")


def test_a_number_of_tokens_that_the_target_does_not_read_is_refused(torch):
    for tokens in ("0", "513"):
        with pytest.raises(UserError, match="reads 1 to 512 tokens"):
            doctor.main(["--target", str(GOLDEN), "--tokens", tokens])


def test_what_transformers_cannot_run_is_told_in_one_sentence(torch, monkeypatch, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "target")
    load = doctor.targets.load_target

    def loaded_then_damaged(*arguments):
        target = load(*arguments)
        (tmp_path / "target" / "model.safetensors").write_bytes(b"cut short")
        return target

    monkeypatch.setattr(doctor.targets, "load_target", loaded_then_damaged)
    with pytest.raises(UserError, match=r"transformers [\d.]+ cannot run .*target"):
        doctor.main(["--target", str(tmp_path / "target")])


def test_a_gguf_is_compared_too(torch, capsys, smollm2_files):
    assert doctor.main(["--target", str(smollm2_files.path), "--tokens", "16"]) == 0
    assert "greedy tokens equal: 16 of 16" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["gpt_oss_mxfp4", "qwen3_fp8"])
def test_quantised_weights_are_compared_by_the_numbers_that_they_stand_for(torch, capsys, case):
    if case.endswith("fp8"):
        pytest.importorskip("accelerate")  # transformers reads fp8 with its help
    assert doctor.main(["--target", str(GOLDEN.parent / case), "--tokens", "16"]) == 0
    assert "greedy tokens equal: 16 of 16" in capsys.readouterr().out
