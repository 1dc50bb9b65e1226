"""Published drafts of all trainers are imported and exported bit for bit; a fault leaves no files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jeagle import export, import_draft
from jeagle.errors import UserError
from jeagle.exporting import choose_interpretation
from jeagle.objective import resolve_objective
from jeagle.run import assemble
from jeagle.runtime.mesh import make_mesh
from tests import tiny
from tests.converting import blank_target, convert, import_run, target
from tests.exchange.drafts import (
    BOTH_ENGINES,
    CARD,
    LONG,
    PLAIN,
    SPECULATORS_ONLY,
    VLLM_ONLY,
    config_in,
    embedding,
    parameters,
    target_ids,
    tensors_in,
    to_sglang,
    to_vllm,
)
from tests.exchange.peers import CONFIG, PEERS, SPEC, weights, write_peer
from tests.exchange.test_peer_features import torch_file
from tests.goldens import cases
from tests.goldens.test_goldens import _speculators_loss as speculators_loss
from tests.goldens.test_goldens import loss_function

SAMPLES = Path(__file__).parent / "exchange" / "samples"
AUX_LAYERS = {"eagle": ("--aux-layers", "2", "4", "5"), "automodel": ("--aux-layers", "2", "4", "5")}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(import_draft, "make_mesh", lambda: mesh)
    monkeypatch.setattr(assemble, "mesh_of", lambda config: mesh)


LAYOUTS = {"sglang": BOTH_ENGINES, "plain": VLLM_ONLY, "speculators": VLLM_ONLY | SPECULATORS_ONLY}


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in LAYOUTS[layout]])
def test_a_draft_goes_in_and_out_bit_for_bit(layout, name, tmp_path):
    """export -> from_eagle3.py -> to_sglang.py or to_vllm.py: the same tensors, the same config."""
    spec = LAYOUTS[layout][name]
    write, to, more = {
        "sglang": (to_sglang, export.to_sglang, ()),
        "plain": (to_vllm, export.to_vllm, ("--layout", "plain")),
        "speculators": (to_vllm, export.to_vllm, ("--embedding", "none")),
    }[layout]
    options = {} if layout == "sglang" else {"layout": layout}
    first = write(spec, tmp_path / "first", embed_VW=embedding(spec), card=CARD, **options)
    run = import_run(first, tmp_path / "runs" / "draft")
    known = blank_target(tmp_path / "target", spec)
    second = convert(to, run, tmp_path / "second", "--target", known, "--dtype", "float32", "--no-check", *more)
    ours, theirs = tensors_in(second), tensors_in(first)
    assert ours.keys() == theirs.keys()
    assert all(ours[tensor].tobytes() == theirs[tensor].tobytes() for tensor in theirs)
    before, after = config_in(first), config_in(second)
    before.pop("speculators_config", None), after.pop("speculators_config", None)  # the target's name
    assert before == after


def test_speculators_layout_brings_the_targets_embedding_and_comes_back_bit_for_bit(tmp_path):
    rows = np.random.default_rng(2).normal(size=(PLAIN.target_vocab, PLAIN.target_width)).astype(np.float32)
    known = target(tmp_path / "target", rows)
    run = import_run(to_vllm(PLAIN, tmp_path / "first"), tmp_path / "runs" / "draft")
    written = convert(export.to_vllm, run, tmp_path / "written", "--target", known, "--dtype", "float32")
    np.testing.assert_array_equal(tensors_in(written)["embed_tokens.weight"], rows)
    again = import_run(written, tmp_path / "runs" / "again")
    second = convert(export.to_vllm, again, tmp_path / "second", "--target", known, "--dtype", "float32")
    assert (second / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()
    loose = ("--target", known, "--no-check")  # a random draft amplifies the rounding to bfloat16
    narrow = tensors_in(convert(export.to_vllm, run, tmp_path / "narrow", *loose))["embed_tokens.weight"]
    np.testing.assert_array_equal(narrow, rows.astype(narrow.dtype))
    assert narrow.dtype == "bfloat16"
    for name, flags in {"none": ("--embedding", "none"), "plain": ("--layout", "plain")}.items():
        without = convert(export.to_vllm, run, tmp_path / name, *loose, *flags)
        assert "embed_tokens.weight" not in tensors_in(without)


@pytest.mark.parametrize("peer", PEERS)
def test_each_trainers_draft_becomes_the_same_run(peer, tmp_path, capsys):
    source = write_peer(peer, tmp_path / "source", weights(tmp_path), CONFIG)
    run = import_run(source, tmp_path / "runs" / "draft", *AUX_LAYERS.get(peer, ()))
    step, spec, params = assemble.load_draft(run, "last")
    assert (step, spec) == (0, SPEC)
    for name, array in parameters(SPEC).items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)
    np.testing.assert_array_equal(assemble.trained_vocabulary(run), target_ids(SPEC))
    assert "aux layers 2 4 5" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "dtype"), [("ckpt_a_default_bf16", "bfloat16"), ("ckpt_b_qwen3_fp32", "float32")])
def test_speculators_own_drafts_come_out_byte_for_byte(name, dtype, tmp_path):
    run = import_run(SAMPLES / name, tmp_path / "runs" / "draft")
    known = target(tmp_path / "target", np.zeros((96, 32), np.float32))
    out = convert(export.to_vllm, run, tmp_path / "out", "--target", known, "--dtype", dtype, "--no-check")
    ours, theirs = tensors_in(out), tensors_in(SAMPLES / name)
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        assert ours[tensor].dtype == theirs[tensor].dtype and ours[tensor].shape == theirs[tensor].shape, tensor
        assert ours[tensor].tobytes() == theirs[tensor].tobytes(), tensor


# The goldens' weights as each peer publishes them.


def golden_config(path: Path) -> dict:
    return cases.load_json(np.load(path)["config_json"])


def golden_weights(path: Path, prefix: str) -> dict[str, np.ndarray]:
    z = np.load(path)
    return {k.removeprefix(prefix): z[k] for k in z.files if k.startswith(prefix)}


SPECFORGE = [p for p in cases.case_files("specforge") if not golden_config(p).get("fc_norm")]


@pytest.mark.parametrize("path", SPECFORGE, ids=lambda p: p.stem)
def test_specforges_own_checkpoint_comes_out_byte_for_byte(path, tmp_path):
    source, named = tmp_path / "source", golden_weights(path, "draft/")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(golden_config(path)))
    save_file(named, source / "model.safetensors")
    run = import_run(source, tmp_path / "runs" / "draft", "--aux-layers", 2, 4, 5)
    known = target(tmp_path / "target", named["embed_tokens.weight"])
    more = ("--target", known, "--dtype", "float32", "--no-check")
    ours = tensors_in(convert(export.to_sglang, run, tmp_path / "out", *more))
    if named["t2d"].all():  # engines are given no map of a full vocabulary: vLLM refuses one
        named = {name: array for name, array in named.items() if name not in ("d2t", "t2d")}
    assert ours.keys() == named.keys()
    for name in named:
        assert ours[name].dtype == named[name].dtype and ours[name].tobytes() == named[name].tobytes(), name


def golden_loss(case: cases.Case, objective):
    """The case's loss as a function of a run, which must hold the case's draft but for the target's layers."""
    loss = jax.jit(loss_function(case, objective)[0])

    def of(run: Path) -> float:
        _, spec, params = assemble.load_draft(run, "last")
        same = {"aux_layers": case.spec.aux_layers, "max_positions": case.spec.max_positions, "end_token_ids": ()}
        assert dataclasses.replace(spec, **same) == case.spec
        np.testing.assert_array_equal(assemble.trained_vocabulary(run), case.draft_to_target)
        if (run / "embedding.npy").is_file():
            np.testing.assert_array_equal(np.load(run / "embedding.npy"), case.weights["embed_tokens.weight"])
        _, state = assemble.draft_from_flat(case.spec, "float32", params, make_mesh(devices=jax.devices()[:1]))
        return float(loss(state)[0])

    return of


OWN_WEIGHTS = [p for p in SPECFORGE if not p.stem.startswith("x")]
"""x3's are those of c1 with another loss."""


@pytest.mark.parametrize("path", OWN_WEIGHTS, ids=lambda p: p.stem)
def test_a_goldens_weights_as_each_peers_draft_give_its_loss(path, tmp_path):
    case, config = cases.specforge(path), golden_config(path)
    config = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    tables = {} if case.spec.draft_vocab == case.spec.target_vocab else golden_weights(path, "draft/")
    named = case.weights | {name: tables[name] for name in ("d2t", "t2d") if name in tables}
    loss = golden_loss(case, resolve_objective("specforge", **case.switches))
    for peer in PEERS:
        source = write_peer(peer, tmp_path / peer, named, config)
        run = import_run(source, tmp_path / "runs" / peer, *AUX_LAYERS.get(peer, ()))
        assert loss(run) == pytest.approx(float(case.arrays["total_loss"]), abs=1e-5), peer


@pytest.mark.parametrize("path", cases.case_files("speculators"), ids=lambda p: p.stem)
def test_imported_weights_of_speculators_give_its_loss(path, tmp_path):
    """As speculators and as vLLM write them. No other trainer's form has norm_before_residual, which all of these were
    trained with; and none but speculators' has c6's norms on queries and keys."""
    source = tmp_path / "source"
    source.mkdir()
    named = {n: a for n, a in golden_weights(path, "w/").items() if not n.startswith("verifier")}
    save_file(named, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(cases.load_json(np.load(path)["info_json"])["config"]))
    case = cases.speculators(path)
    switches = case.switches | {"loss": speculators_loss(case.switches["loss"])}
    loss = golden_loss(case, resolve_objective("speculators", **switches))
    run = import_run(source, tmp_path / "runs" / "draft")
    assert loss(run) == pytest.approx(float(case.arrays["loss"]), abs=1e-5)
    if case.spec.qk_norm or len(case.spec.aux_layers) != 3:
        return
    form = cases.load_json(np.load(path)["info_json"])["config"]
    flags = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "norm_output")
    config = form["transformer_layer_config"] | {flag: form[flag] for flag in flags}
    source = write_peer("vllm", tmp_path / "plain", named, config)
    run = import_run(source, tmp_path / "runs" / "plain", "--norm-output", "carry")
    assert loss(run) == pytest.approx(float(case.arrays["loss"]), abs=1e-5)


# What a target decides.


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    return tiny.write_target(tmp_path_factory.mktemp("target") / "target")


def fitting(known: Path, **changes):
    """A draft's spec that fits the tiny target."""
    vocab = json.loads((known / "config.json").read_text())["vocab_size"]
    sizes = {"target_width": tiny.WIDTH, "width": tiny.WIDTH, "target_vocab": vocab, "max_positions": 512, "rope": LONG}
    return dataclasses.replace(PLAIN, **sizes, draft_vocab=40, **changes)


def ambiguous(known: Path, folder: Path) -> Path:
    """SpecForge's form, with a norm_output of unknown meaning."""
    to_sglang(fitting(known), folder)
    config = config_in(folder)
    del config["jeagle_version"]
    (folder / "config.json").write_text(json.dumps(config | {"norm_output": True}))
    return folder


def test_a_target_answers_open_questions_and_the_run_can_be_measured(known, tmp_path, capsys):
    source = ambiguous(known, tmp_path / "source")
    with pytest.raises(
        UserError,
        match=r"2 possible interpretations \(norm_output head; or norm_output carry\).*--norm-output.*--target",
    ):
        import_run(source, tmp_path / "runs" / "draft")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    more = ("--target", known, "--max-prompts", 2, "--max-new-tokens", 6, "--draft-tokens", 2)
    run = import_run(source, tmp_path / "runs" / "draft", *more)
    printed = capsys.readouterr().out
    assert re.search(r"^norm_output head +1\.\d", printed, re.M) and re.search(
        r"^norm_output carry +1\.\d", printed, re.M
    )
    assert (
        "no interpretation is clearly the best one" in printed and "hardly any token is accepted" in printed
    )  # its weights are noise
    measured = json.loads((run / "bench.json").read_text())
    assert (measured["step"], measured["prompts_measured"], measured["draft_tokens"]) == (0, 2, 2)
    out = convert(export.to_vllm, run, tmp_path / "out", "--no-check")
    assert json.loads((out / "jeagle_export.json").read_text())["acceptance"]["prompts_measured"] == 2
    assert "acceptance_length" in (out / "README.md").read_text()


def test_the_most_accepted_interpretation_is_chosen_and_a_clear_lead_gives_no_warning(
    known, tmp_path, monkeypatch, capsys
):
    def measure(config, folder, interpretation, params, target, prompts):
        rounds = (
            [[3, 2, 3], [2, 3, 3], [3, 3, 3]] if interpretation.spec.carry_normed else [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
        )
        length = 1 + float(np.mean(rounds))
        return choose_interpretation.MeasuredInterpretation(
            interpretation, rounds, {"acceptance_length": length, "acceptance_by_position": [0.5]}
        )

    monkeypatch.setattr(choose_interpretation, "_measure", measure)
    run = import_run(ambiguous(known, tmp_path / "source"), tmp_path / "runs" / "draft", "--target", known)
    assert assemble.load_draft(run, "last")[1] == fitting(known, carry_normed=True)
    printed = capsys.readouterr().out
    assert "chosen: norm_output carry\n" in printed and "clearly" not in printed and "warning" not in printed


def test_a_lead_is_counted_in_standard_errors_over_prompts():
    assert choose_interpretation.lead_in_standard_errors([[1, 1], [2, 2]], [[1, 1], [2, 2]]) == 0
    assert choose_interpretation.lead_in_standard_errors([[3], [0]], [[0], [3]]) == 0
    assert choose_interpretation.lead_in_standard_errors([[2], [3], [2], [3]], [[1], [1], [1], [1]]) == pytest.approx(
        1.5 / (0.57735 / 2), rel=1e-4
    )


def test_a_draft_for_another_target_is_refused(known, tmp_path):
    with pytest.raises(UserError, match=r"width 24 and vocabulary 40.*--target"):
        import_run(to_sglang(PLAIN, tmp_path / "source"), tmp_path / "run", "--target", known)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("draft_vocab", [40, 0], ids=["reduced", "full"])
def test_a_head_that_is_missing_is_the_targets(draft_vocab, known, tmp_path, monkeypatch):
    choose = lambda config, folder, interpretations, *_, **__: (interpretations[0].spec, [])  # noqa: E731
    monkeypatch.setattr(import_draft, "choose_interpretation", choose)
    spec = fitting(known)
    spec = dataclasses.replace(spec, draft_vocab=draft_vocab or spec.target_vocab)
    source = to_sglang(spec, tmp_path / "source")
    without("lm_head.weight")(source)
    (source / "config.json").write_text(json.dumps(config_in(source) | {"draft_vocab_size": None}))
    with pytest.raises(UserError, match=r"lm_head\.weight is missing.*--target"):
        import_run(source, tmp_path / "runs" / "draft")
    run = import_run(source, tmp_path / "runs" / "draft", "--target", known)
    _, found, params = assemble.load_draft(run, "last")
    assert found == spec
    rows = tensors_in(known)["lm_head.weight"]
    np.testing.assert_array_equal(params["lm_head"], rows[assemble.trained_vocabulary(run)])


# A fault leaves no files.


def truncated(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def with_code(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_file({"norm.weight": shutil.rmtree}))


def without(name):
    def change(folder):
        tensors = {n: a for n, a in tensors_in(folder).items() if n != name}
        save_file(tensors, folder / "model.safetensors")

    return change


def other_dialect(folder):
    (folder / "config.json").write_text(json.dumps(config_in(folder) | {"architectures": ["MedusaModel"]}))


SOURCES = {
    "no folder": (shutil.rmtree, "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "truncated": (truncated, "cannot be read"),
    "code": (with_code, "might run code"),
    "a tensor short": (without("fc.weight"), r"fc\.weight is missing"),
    "no map": (without("d2t"), "d2t"),
    "unknown dialect": (other_dialect, "architectures"),
}


@pytest.mark.parametrize("fault", SOURCES)
def test_a_faulty_source_gives_one_sentence_and_no_run(fault, tmp_path):
    change, named = SOURCES[fault]
    source = to_sglang(PLAIN, tmp_path / "source")
    change(source)
    with pytest.raises(UserError, match=named) as error:
        import_run(source, tmp_path / "runs" / "draft")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_an_existing_run_is_not_changed(tmp_path):
    source = to_sglang(PLAIN, tmp_path / "source")
    run = import_run(source, tmp_path / "runs" / "draft")
    before = sorted(p.name for p in run.rglob("*"))
    for _ in range(2):
        with pytest.raises(UserError, match="is there already"):
            import_run(source, run)
    assert sorted(p.name for p in run.rglob("*")) == before
