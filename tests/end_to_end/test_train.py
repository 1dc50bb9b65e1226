"""Training as a user runs it, on a tiny target: resume, processes, meshes, wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jeagle import train
from jeagle.runtime.cli import run
from tests import tiny

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "llama3_8b.py")
STEPS = 12


def environment(devices: int = 1) -> dict[str, str]:
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def command(module: str, flags: list[str]) -> list[str]:
    return [sys.executable, "-m", f"jeagle.{module}", "--config", RECIPE, *flags]


def call(module: str, flags: list[str], *, devices: int = 1, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(module, flags), env=environment(devices), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return done


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def straight(folder) -> list[tuple[int, float]]:
    """The losses of a run that nobody disturbs."""
    flags = tiny.flags(
        folder, name="straight", train__steps=STEPS, train__save_every=3, draft__layers=2, draft__engines="vllm"
    )
    call("prepare", flags)
    call("train", flags)
    found = losses(folder, "straight")
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert found[-1][1] < found[0][1]
    return found


@pytest.mark.parametrize("kill_after", [1, 5, 8])
def test_killed_and_resumed_equals_uninterrupted(folder, straight, kill_after):
    """SIGKILL once so many steps are logged; the next call gives the same losses, bit for bit."""
    name = f"killed{kill_after}"
    flags = tiny.flags(
        folder, name=name, train__steps=STEPS, train__save_every=3, draft__layers=2, draft__engines="vllm"
    )
    process = subprocess.Popen(command("train", flags), env=environment(), stderr=subprocess.DEVNULL, cwd=ROOT)
    metrics = folder / "runs" / name / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    call("train", flags)
    assert losses(folder, name) == straight


def test_a_signal_saves_and_the_next_call_goes_on(folder, straight):
    flags = tiny.flags(
        folder, name="stopped", train__steps=STEPS, train__save_every=1000, draft__layers=2, draft__engines="vllm"
    )
    process = subprocess.Popen(command("train", flags), env=environment(), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    metrics = folder / "runs" / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    if process.returncode:  # it may have finished before the signal came
        assert process.returncode == 130 and "Traceback" not in said
    call("train", flags)
    assert losses(folder, "stopped") == straight


@pytest.mark.parametrize(("fsdp", "tensor", "data"), [(8, 1, 1), (2, 2, 2)])
def test_losses_do_not_depend_on_the_mesh(folder, straight, fsdp, tensor, data):
    mesh = {"mesh__fsdp": fsdp, "mesh__tensor": tensor, "mesh__data": data}
    name = f"mesh{fsdp}{tensor}{data}"
    flags = tiny.flags(
        folder, name=name, train__steps=STEPS, train__save_every=3, draft__layers=2, draft__engines="vllm", **mesh
    )
    call("train", flags, devices=8)
    np.testing.assert_allclose([x for _, x in losses(folder, name)], [x for _, x in straight], rtol=2e-4)


def test_two_processes_give_one_process_losses(folder, straight):
    flags = tiny.flags(
        folder, name="two", train__steps=STEPS, train__save_every=3, draft__layers=2, draft__engines="vllm"
    )
    launch = ["bash", str(ROOT / "launch" / "gpu_node.sh"), "--processes", "2", "--", *command("train", flags)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose([x for _, x in losses(folder, "two")], [x for _, x in straight], rtol=2e-4)


def test_every_trainable_tensor_moves(folder, straight):
    from jeagle.runtime.checkpoints import load_named

    _, first = load_named(folder / "runs" / "straight" / "checkpoints", "9")
    _, last = load_named(folder / "runs" / "straight" / "checkpoints", "last")
    for name in first:
        if name.startswith(".draft"):
            assert last[name].dtype == np.float32
            assert not np.array_equal(first[name], last[name]), name


WRONG = {
    "unknown field": (["--train.step", "3"], "did you mean --train.steps"),
    "no such target": (["--target.ref", "nowhere"], "nowhere"),
    "taps out of range": (["--target.aux-layers", "1", "2", "99"], "layer boundaries"),
    "unknown loss": (["--objective.loss", "soft_cee"], "soft_cee"),
    "mesh": (["--mesh.tensor", "3"], "does not fit"),
    "zero rows": (["--train.batch-rows", "0"], "above 0"),
}


@pytest.mark.parametrize(("more", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_sentence(folder, straight, more, said, capsys, monkeypatch):
    flags = tiny.flags(folder, name="wrong", train__steps=STEPS)
    monkeypatch.setattr(sys, "argv", ["train", "--config", RECIPE, *flags, *more])
    with pytest.raises(SystemExit, match="2"):
        run(train.main)
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith("error: ") and said in stderr and "Traceback" not in stderr
    assert not (folder / "runs" / "wrong" / "checkpoints").exists()


def test_a_run_with_other_settings_is_refused(folder, straight):
    flags = tiny.flags(
        folder, name="straight", train__steps=STEPS, train__save_every=3, draft__layers=2, draft__engines="vllm"
    )
    done = call("train", [*flags, "--train.learning-rate", "0.5"], status=2)
    assert "train.learning_rate" in done.stderr


def test_help_explains_every_field(folder):
    said = call("train", ["--help"]).stdout
    for flag in ("--train.learning-rate", "--objective.slots", "--draft.ttt-steps", "--mesh.fsdp"):
        assert flag in said
