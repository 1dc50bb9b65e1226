"""Loading gives the same numbers in every way, reads no more than necessary, and fails before it reads anything."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jeagle import targets
from jeagle.config import RunConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.run import assemble
from jeagle.runtime import host
from jeagle.runtime.mesh import make_mesh
from jeagle.targets.checkpoint import layout, load
from jeagle.targets.checkpoint.load import from_slices
from jeagle.targets.quantised.views import WeightSource
from tests import tiny

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ["llama", "gpt_oss", "deepseek_v2", "qwen3_next", "mixtral", "phi3"]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def source_of(folder: Path):
    return targets.open_weights(targets.resolve(str(folder)))


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


def edit(folder: Path, **switches) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | switches))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("stored", ["", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_stacks_made_on_the_devices_equal_those_made_on_the_host(case, stored, monkeypatch):
    source, mesh = source_of(GOLDENS / case), make_mesh(fsdp=2, tensor=2, expert=2)
    host = targets.load_target(source, mesh, "bfloat16", stacked=True, stored=stored)
    monkeypatch.setattr(load, "SMALL_STACK", 0)
    devices = targets.load_target(source, mesh, "bfloat16", stacked=True, stored=stored)
    for ours, theirs in zip(jax.tree.leaves(devices.state), jax.tree.leaves(host.state), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("axes", [(("data", "fsdp"), None), (None, "tensor"), ("fsdp", "tensor"), (None, None)])
@pytest.mark.parametrize("at_once", [True, False])
def test_slices_are_read_once_and_put_where_they_belong(axes, at_once):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole = np.arange(12 * 8, dtype=np.float32).reshape(12, 8)
    read: list[int] = []

    def slices(index):
        part = whole.astype(ml_dtypes.bfloat16).T.swapaxes(0, 1)[index]  # another type and order than is wanted
        read.append(part.size)
        return part

    array = from_slices(
        (12, 8), np.dtype("float32"), NamedSharding(mesh, PartitionSpec(*axes)), slices, at_once=at_once
    )
    np.testing.assert_array_equal(np.asarray(array), whole)
    assert sum(read) == whole.size  # a copy on several devices is read for all of them
    assert not at_once or len(read) == 1


def test_progress_counts_every_byte():
    seen: list[tuple[int, int]] = []
    source = source_of(GOLDENS / "qwen3_moe")
    for stacked in (True, False):
        seen.clear()
        target = targets.load_target(
            source, one_device(), "float32", stacked=stacked, progress=lambda done, total: seen.append((done, total))
        )
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(target.state))
        assert seen[-1] == (held, held) and seen == sorted(seen)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("stored", ["", "int8", "fp8"])
@pytest.mark.parametrize("case", ["llama", "gpt_oss", "deepseek_v2", "qwen3_next"])
def test_the_estimate_equals_the_memory_used_on_a_device(case, stored, monkeypatch):
    source, mesh = source_of(GOLDENS / case), make_mesh(fsdp=2, tensor=2, expert=2)
    asked: list[int] = []
    monkeypatch.setattr(layout, "free_bytes", lambda mesh: asked.append(1))
    target = targets.load_target(source, mesh, "bfloat16", stacked=True, stored=stored)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(target.state))
    assert asked
    for limit, refused in ((held, False), (held - 1, True)):
        monkeypatch.setattr(layout, "free_bytes", lambda mesh, limit=limit: limit)
        if refused:
            with pytest.raises(UserError, match="on each of 8 cpu devices"):
                targets.load_target(source, mesh, "bfloat16", stacked=True, stored=stored)
        else:
            targets.load_target(source, mesh, "bfloat16", stacked=True, stored=stored)


class Untouched(WeightSource):
    """A source whose arrays must not be read."""

    def __init__(self, source):
        self.config, self.names, self.shape, self.dtype = source.config, source.names, source.shape, source.dtype

    def read(self, name, index=None):
        raise AssertionError(f"{name} is read before all is checked")


def refused(folder: Path, said: str, **how) -> None:
    with pytest.raises(UserError, match=said) as error:
        targets.load_target(Untouched(source_of(folder)), one_device(), "float32", **how)
    assert "\n" not in str(error.value)


def test_too_little_memory_is_reported_with_numbers_and_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(host, "host_bytes_available", lambda: 30_000)
    said = (
        r"weights, 8.09e-05 GiB in all, take 8.09e-05 GiB on each of 1 cpu device, and only 2.79e-05 GiB are free "
        r"there: use more devices \(--mesh.fsdp .*\), keep the weights in half the bytes \(--target.weights int8\), or "
        "take a smaller model"
    )
    refused(folder, said)


def test_available_memory_is_that_of_the_container_where_it_has_less(tmp_path, monkeypatch):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    monkeypatch.setattr(host, "_MEMINFO", meminfo)
    monkeypatch.setattr(host, "_CGROUP", cgroup)
    assert host.host_bytes_available() is None
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert host.host_bytes_available() == 5000 * 1024
    cgroup.mkdir()
    for name, text in (("memory.max", "max"), ("memory.current", "600"), ("memory.stat", "anon 1\ninactive_file 200")):
        (cgroup / name).write_text(text)
    assert host.host_bytes_available() == 5000 * 1024
    (cgroup / "memory.max").write_text("1000\n")
    assert host.host_bytes_available() == 600
    assert host.free_bytes(make_mesh()) == 600 // jax.device_count()


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, r"lack the tensor model\.layers\.2\.mlp\.up_proj\.weight: the download may be incomplete")


def test_a_missing_expert_is_named(tmp_path):
    folder = Path(shutil.copytree(GOLDENS / "mixtral", tmp_path / "mixtral"))
    name = next(n for n in load_file(folder / "model.safetensors") if "layers.1" in n and ".experts.3." in n)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"lack the tensor {name}")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.1.self_attn.k_proj.weight", (8, 32)), ("model.norm.weight", (33,)), ("lm_head.weight", (32, 48))],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, name, shape):
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(shape, ml_dtypes.bfloat16)}))
    refused(folder, rf"tensor {name} is \({shape[0]},.*\); config\.json makes it \(")


def test_an_unknown_architecture_is_refused_with_the_supported_ones(folder):
    edit(folder, architectures=["MambaForCausalLM"], model_type="mamba")
    refused(
        folder, "architecture MambaForCausalLM is not supported; supported are: .*LlamaForCausalLM.*adding_a_target"
    )


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"attention_sharpness": 2.0}, "attention_sharpness = 2.0, which jeagle does not know for LlamaForCausalLM"),
        ({"hidden_act": "tanhshrink"}, "activation 'tanhshrink' is not supported"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types = .*not supported"),
    ],
)
def test_an_unsupported_key_is_named(folder, switches, said):
    edit(folder, **switches)
    refused(folder, said)


@pytest.mark.parametrize("aux_layers", [(1, 2, 99), (3, 2, 1), (-1, 2)])
def test_a_layer_out_of_range_is_reported_before_anything_is_read(tmp_path, monkeypatch, aux_layers):
    folder = tiny.write_target(tmp_path / "target")
    config = RunConfig("x", target=TargetConfig(ref=str(folder), aux_layers=aux_layers))
    monkeypatch.setattr(targets, "load_target", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(UserError, match=f"layer boundaries must rise strictly, from 0 .* to {tiny.LAYERS}"):
        assemble.load_target(config, one_device())


def test_a_tokenizer_larger_than_the_embedding_is_reported_before_anything_is_read(tmp_path, monkeypatch):
    folder = tiny.write_target(tmp_path / "target")
    edit(folder, vocab_size=100)
    monkeypatch.setattr(targets, "load_target", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(UserError, match="has 3.. tokens, but the target embeds only 100"):
        assemble.load_target(RunConfig("x", target=TargetConfig(ref=str(folder))), one_device())


def test_sizes_add_up():
    """The progress bar counts the bytes of the file if nothing is narrowed or tied."""
    source = source_of(GOLDENS / "llama")
    target = targets.load_target(source, one_device(), "float32", stacked=True)
    numbers = sum(math.prod(source.shape(name)) for name in source.names())
    assert sum(leaf.size for leaf in jax.tree.leaves(target.state)) == numbers
