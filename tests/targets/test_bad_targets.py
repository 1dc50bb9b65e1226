"""For every fault of a target, a command prints one sentence and exits with status 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jeagle import regenerate, train
from jeagle.runtime import cli, host
from tests import tiny

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2_135m.py"


def edit(folder: Path, **switches) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | switches))


def in_two_shards(folder: Path) -> Path:
    """Splits the weights; returns the second shard."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder / "model-00002-of-00002.safetensors"


def lose_a_shard(folder: Path) -> None:
    in_two_shards(folder).unlink()


def cut_a_shard(folder: Path) -> None:
    shard = in_two_shards(folder)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def cut_in_the_header(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])


def widen_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((tiny.INNER, tiny.WIDTH + 1), np.float32)
    save_file(tensors, folder / "model.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors"),
    "truncated file": (cut_a_shard, "model-00002-of-00002.safetensors"),
    "truncated header": (cut_in_the_header, "model.safetensors"),
    "wrong shape": (widen_a_tensor, "model.layers.3.mlp.up_proj.weight is (48, 33)"),
    "unknown architecture": (lambda f: edit(f, architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
    "unsupported switch": (lambda f: edit(f, attention_sharpness=2), "attention_sharpness = 2"),
    "tokenizer too large": (lambda f: edit(f, vocab_size=100), "embeds only 100"),
    "broken config.json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no target": (lambda f: [p.unlink() for p in f.iterdir()], "holds no weights"),
}


def error_of(command: Callable, arguments: list[str], monkeypatch, capsys) -> str:
    """The message of a command that fails; its status must be 2, and the sentence alone on its line."""
    monkeypatch.setattr(sys, "argv", ["jeagle", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.run(command)
    said = capsys.readouterr().err
    assert left.value.code == cli.USER_ERROR == 2, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and len(last) < 700
    return last


def asked(folder: Path) -> list[str]:
    prompts = folder.parent / "prompts.jsonl"
    prompts.write_text('{"turns": ["the cat sat"]}\n')
    return ["--target", str(folder), "--prompts", str(prompts), "--out", str(folder.parent / "answers.jsonl")]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_one_sentence_and_status_2(fault, tmp_path, monkeypatch, capsys):
    folder = tiny.write_target(tmp_path / "target")
    break_it, named = FAULTS[fault]
    break_it(folder)
    assert named in error_of(regenerate.main, asked(folder), monkeypatch, capsys)
    assert not (tmp_path / "answers.jsonl").exists()


def test_too_little_memory_is_reported_with_the_estimate(tmp_path, monkeypatch, capsys):
    folder = tiny.write_target(tmp_path / "target")
    monkeypatch.setattr(host, "host_bytes_available", lambda: 10_000)
    said = error_of(regenerate.main, asked(folder), monkeypatch, capsys)
    assert "GiB on each of" in said and "are free there: use more devices" in said


def test_a_layer_out_of_range_is_reported(tmp_path, monkeypatch, capsys):
    arguments = ["--config", str(RECIPE), *tiny.flags(tmp_path), "--target.aux-layers", "1", "2", "99"]
    said = error_of(train.main, arguments, monkeypatch, capsys)
    assert (
        f"--target.aux-layers 1 2 99: layer boundaries must rise strictly, from 0 (embeddings) to {tiny.LAYERS}" in said
    )
