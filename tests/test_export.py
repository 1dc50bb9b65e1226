"""An imported draft is exported byte for byte; a fault gives one sentence and leaves no files."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jeagle import exchange, export, features, import_draft
from jeagle.errors import UserError
from jeagle.runtime.mesh import make_mesh
from tests.converting import blank_target, convert, import_run
from tests.exchange.drafts import PLAIN, to_sglang


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[Path, Path]:
    """(a run, what it was made from)."""
    folder = tmp_path_factory.mktemp("imported")
    source = to_sglang(PLAIN, folder / "source")
    patch = pytest.MonkeyPatch()
    patch.setattr(import_draft, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    run = import_run(source, folder / "runs" / "draft")
    patch.undo()
    return run, source


def copied(imported, tmp_path):
    return Path(shutil.copytree(imported[0], tmp_path / "runs" / "draft"))


def lose(name):
    return lambda run: next(run.rglob(name)).unlink()


RUNS = {
    "no run": (lambda run: (run / "config.json").unlink(), [], "is no run"),
    "nothing trained": (lambda run: (run / "draft.json").unlink(), [], "no trained draft"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), [], "no checkpoint"),
    "no such step": (lambda run: None, ["--step", "7"], "no checkpoint of step 7; it has 0"),
    "no step at all": (lambda run: None, ["--step", "newest"], "no checkpoint of step newest; it has 0"),
    "no held-out figures": (lambda run: None, ["--step", "best"], "no checkpoint with held-out figures"),
    "no metadata": (lose("_METADATA"), [], "no finished checkpoint"),
    "no manifest": (lambda run: (run / "checkpoints/0/default/manifest.ocdbt").unlink(), [], "incomplete or damaged"),
    "no arrays": (
        lambda run: shutil.rmtree(run / "checkpoints/0/default/ocdbt.process_0/d"),
        [],
        "incomplete or damaged",
    ),
    "a damaged config": (lambda run: (run / "config.json").write_text("{"), [], "is damaged"),
    "a damaged description": (lambda run: (run / "draft.json").write_text('{"draft": {}}'), [], "is damaged"),
    "no target": (lambda run: None, [], "names no target: give --target"),
}


@pytest.mark.parametrize("fault", RUNS)
def test_a_faulty_run_gives_one_sentence_and_no_export(fault, imported, tmp_path):
    change, more, named = RUNS[fault]
    run, known = copied(imported, tmp_path), blank_target(tmp_path / "target", PLAIN)
    change(run)
    more = more if fault == "no target" else [*more, "--target", known]
    with pytest.raises(UserError, match=re.escape(named)) as error:
        convert(export.to_sglang, run, tmp_path / "out" / "draft", *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_target_that_the_draft_was_not_made_for_is_refused(imported, tmp_path):
    other = blank_target(tmp_path / "target", dataclasses.replace(PLAIN, target_vocab=41))
    with pytest.raises(UserError, match=r"vocabulary 40; .* has 24 and 41: give --target"):
        convert(export.to_sglang, imported[0], tmp_path / "out", "--target", other)


def test_an_export_that_would_replace_other_files_is_refused(imported, tmp_path):
    known = blank_target(tmp_path / "target", PLAIN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no export of jeagle's"):
        convert(export.to_sglang, imported[0], tmp_path / "out", "--target", known)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_copy_in_object_storage_is_exported_as_the_run_is(imported, tmp_path, bucket):
    url = f"{bucket}/runs/draft"
    copy = features.Storage(url)
    for path in imported[0].rglob("*"):
        if path.is_file():
            copy.write(str(path.relative_to(imported[0])), path.read_bytes())
    known = blank_target(tmp_path / "target", PLAIN)
    more = ("--target", known, "--dtype", "float32")
    out = convert(export.to_sglang, url, tmp_path / "out", *more)
    assert (out / "model.safetensors").read_bytes() == (imported[1] / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--out"):
        export.to_sglang(["--checkpoint", url])
    with pytest.raises(UserError, match="not a folder of this machine"):
        convert(export.to_sglang, imported[0], "s3://bucket/out", *more)
    with pytest.raises(UserError, match="s3://.*/runs/none is not a run"):
        convert(export.to_sglang, f"{bucket}/runs/none", tmp_path / "other", *more)


def test_an_export_that_does_not_read_back_is_removed(imported, tmp_path, monkeypatch):
    known = blank_target(tmp_path / "target", PLAIN)
    write = exchange.export_writer.write_safetensors

    def swapped(path, tensors):
        first, second = "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"
        write(path, tensors | {first: tensors[second], second: tensors[first]})

    monkeypatch.setattr(exchange.export_writer, "write_safetensors", swapped)
    with pytest.raises(UserError, match="does not give the trained draft's logits"):
        convert(export.to_sglang, imported[0], tmp_path / "out", "--target", known)
    assert not (tmp_path / "out").exists()


def test_a_wrong_row_of_the_embedding_does_not_read_back(imported, tmp_path, monkeypatch):
    known = blank_target(tmp_path / "target", PLAIN)
    write = exchange.export_writer.write_safetensors

    def moved(path, tensors):
        name = "embed_tokens.weight"
        rows = np.zeros(tensors[name].shape, np.float32)
        rows[-1, -1] = 1e-3
        write(path, tensors | {name: tensors[name]._replace(blocks=lambda: iter([rows]))})

    monkeypatch.setattr(exchange.export_writer, "write_safetensors", moved)
    more = ("--target", known, "--dtype", "float32")
    with pytest.raises(UserError, match="embedding"):
        convert(export.to_vllm, imported[0], tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    convert(export.to_vllm, imported[0], tmp_path / "out", *more, "--no-check")


def test_a_target_without_its_embedding_gives_one_sentence_and_vllm_needs_none(imported, tmp_path):
    known = blank_target(tmp_path / "target", PLAIN)
    save_file({"model.norm.weight": np.ones(24, np.float32)}, known / "model.safetensors")
    more = ("--target", known, "--dtype", "float32")
    with pytest.raises(UserError, match=r"lack the tensor .*embed_tokens.*--embedding none") as error:
        convert(export.to_vllm, imported[0], tmp_path / "out", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    convert(export.to_vllm, imported[0], tmp_path / "out", *more, "--embedding", "none")
