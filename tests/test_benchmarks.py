"""The benchmarks' own laws, at a size that takes no time."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import online, ops, repository, trace
from benchmarks.random_target import random_target
from benchmarks.step import bench_of
from benchmarks.whole_step import MODELS, build
from benchmarks.works import Work, make_batch
from jeagle.config import DraftConfig, RunConfig, TargetConfig, TrainConfig
from jeagle.errors import UserError
from jeagle.run import assemble
from jeagle.targets import abstract_target
from jeagle.targets.families import read_spec

TINY = Work(
    rows=2,
    length=32,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    vocab=64,
    draft_vocab=32,
    steps=2,
    supervised=0.5,
)


@pytest.fixture(scope="module")
def bench():
    return bench_of(TINY, make_batch(TINY), "float32", remat=False)


def test_no_step_counts_less_than_is_needed(bench):
    assert 0 < bench.flops()["flops_share"] <= 1


def test_backends_of_attention_are_given_the_same(bench):
    key, backends = jax.random.key(0), ("reference", "chunked")
    found = [jax.jit(op.function)(*op.make(key)) for op in (ops.attention(bench, name) for name in backends)]
    assert found[0] > 0
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-5)


def test_an_op_is_measured_forward_and_backward(bench):
    op = ops.loss(bench)
    found = op.measure(run=False, budget_s=0)
    # Of each slot one product forward and two backward, of each position the teacher's; beside them, of each slot, only
    # inner products of the teacher with the logits.
    products = 2 * TINY.width * TINY.draft_vocab * TINY.rows * bench.width * (3 * TINY.steps + 1)
    inner = 2 * TINY.draft_vocab * TINY.rows * bench.width * TINY.steps
    assert found["flops_counted"] in (products + inner, products + 2 * inner)


@pytest.fixture(scope="module")
def whole(one_device):
    numbers = {"target": TargetConfig(dtype="float32"), "train": TrainConfig(dtype="float32")}
    return build(RunConfig("online", draft=DraftConfig(ttt_steps=2), **numbers), MODELS["tiny"])


def test_a_draft_learns_the_same_from_features_that_are_read(whole, tmp_path, capsys):
    work = whole.work(2, 32, 0.5)
    computed = online.measure(whole, work, None, 0.0, tmp_path)
    read = online.measure(whole.without_target(), work, whole.read(work), 0.0, None)
    assert read["first_loss"] == pytest.approx(computed["first_loss"], rel=1e-6)
    for found in (computed, read):
        assert 0 < found["flops_needed"] <= found["flops_counted"]
        assert found["mfu_needed"] is None  # nobody knows a CPU's peak
    assert read["flops_needed"] < computed["flops_needed"]
    assert read["step_bytes"] < computed["step_bytes"]  # the target is not there

    top = computed["profile"]["top"]
    assert len(top) == trace.TOP
    assert 0 < sum(op["share"] for op in top) <= 1.001
    assert 0 < computed["profile"]["busy_share"] <= 1
    assert any("train_step" in op["made_from"] for op in top)
    online.main(["--read", str(tmp_path), "--json"])
    again = json.loads(capsys.readouterr().out)["top"]
    assert [op["op"] for op in again] == [op["op"] for op in top]


def test_a_random_target_lies_as_a_loaded_one_does(one_device):
    spec, settings = read_spec(MODELS["tiny"]), TargetConfig(weights="fp8")
    mesh = assemble.mesh_of(RunConfig("online"))
    made, wanted = random_target(spec, mesh, settings), abstract_target(spec, jnp.bfloat16, stored="fp8", mesh=mesh)
    assert made.graphdef == wanted.graphdef
    shapes = [[leaf.shape for leaf in jax.tree.leaves(target.state)] for target in (made, wanted)]
    assert shapes[0] == shapes[1]
    assert made.model().blocks[0].mlp.up_proj.kernel[...].dtype == jnp.float8_e4m3fn
    assert made.model().embed_tokens[...].dtype == jnp.bfloat16


def test_a_length_without_room_says_so_and_the_others_run(whole, monkeypatch, capsys):
    def measure(step, work, *_):
        if work.length == 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        if work.length == 16:
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
        return {"first_loss": 1.0}

    monkeypatch.setattr(online, "build", lambda *_: whole)
    monkeypatch.setattr(online, "measure", measure)
    command = ["--model", "tiny", "--rows", "2", "--json", "--lengths"]
    online.main([*command, "64", "32"])
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["lengths"]
    assert first["out_of_memory"].startswith("RESOURCE_EXHAUSTED")
    assert second == {"length": 32, "rows": 2, "first_loss": 1.0}
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        online.main([*command, "16"])


def track(pid, process, tid, thread, *runs):
    """Of a trace: a track's names, and what ran on it, (name, begin, duration, further arguments)."""
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}}
    for name, begun, duration, args in runs:
        yield {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": begun, "dur": duration, "args": args}


def test_a_gpus_time_is_its_streams():
    product = {"hlo_op": "dot.3", "name": "jit(f)/dot_general"}
    streams = [("nvjet", 0, 10, product), ("loop_fusion", 10, 30, {}), ("nvjet", 60, 40, product)]
    raw = [
        *track(1, "/device:GPU:0", 13, "Stream #13(Compute)", *streams),
        *track(1, "/device:GPU:0", 2, "XLA Ops", ("dot.3", 0, 100, {})),  # says it again
        *track(2, "/host:CPU", 9, "python", ("call", 0, 500, {}), ("copy.1", 0, 500, {"hlo_op": "copy.1"})),
    ]
    found = trace.summary([raw])
    assert (found["devices"], found["busy_share"], found["truncated"]) == (1, 0.8, False)
    assert found["seconds_a_device"] == pytest.approx(100e-6)
    assert [(op["op"], op["share"], op["calls"], op["made_from"]) for op in found["top"]] == [
        ("dot.3", 0.625, 2, "jit(f)/dot_general"),
        ("loop_fusion", 0.375, 1, ""),
    ]
    assert "62.5%" in trace.table(found)


def test_a_loop_counts_what_its_body_leaves():
    ops = [("while", 0, 100, {}), ("fusion.1", 10, 30, {}), ("fusion.1", 50, 40, {"tf_op": "jit(f)/mul"})]
    raw = [event for pid in (1, 2) for event in track(pid, f"/device:TPU:{pid}", 1, "XLA Ops", *ops)]
    found = trace.summary([raw])
    seconds = {op["op"]: op["seconds"] for op in found["top"]}
    assert seconds == pytest.approx({"fusion.1": 70e-6, "while": 30e-6})  # of each of the two devices
    assert sum(seconds.values()) == pytest.approx(found["seconds_a_device"])


def test_a_folder_without_a_trace_is_said(tmp_path):
    with pytest.raises(UserError, match="trace.json.gz"):
        trace.folders(tmp_path)


CONFIG = """
class TargetConfig:
    ref: str = ""
class RunConfig:
    name: str
    "The name of the run."
    target: TargetConfig = TargetConfig()
"""
ARGUMENTS = """
class BenchArguments:
    draft: tyro.conf.Positional[Path]
    max_prompts: int = 8
"""
BENCH = """
from jeagle.arguments import BenchArguments
# One is named once, the other twice.
def _once(): return _twice(), _twice()
def _twice(): return "--html"
_once()
"""


def test_the_repository_is_counted():
    sources = {
        "pyproject.toml": '[project]\ndependencies = ["jax>=0.10", "jax>=0.11; python_version >= \'3.12\'", "numpy"]',
        "jeagle/config.py": CONFIG,
        "jeagle/arguments.py": ARGUMENTS,
        "jeagle/bench.py": BENCH,
        "jeagle/data/rows.py": "class TargetConfig: ...",
        "tests/test_bench.py": "",
        "tests/tiny.py": "",
    }
    found = repository.measure(sources, names=True)
    assert (found["files"], found["modules_at_the_top"], found["test_files"], found["dependencies"]) == (4, 3, 1, 2)
    assert found["flags"] == ["html", "max-prompts", "name", "target.ref"]
    assert found["private_functions_used_once"] == ["_once"]
    assert found["names_with_several_meanings"] == ["TargetConfig"]
    assert found["lines"] == {"all": 18, "blanks": 3, "code": 13, "comments": 1, "docstrings": 1}
