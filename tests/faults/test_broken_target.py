"""A target with numbers that are not finite stops generation and bench at once, and the message names the layer.

tests/training/test_step.py has the same law for training. Weights that belong to another config.json are told, too.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jeagle import decoding, targets
from jeagle import flags as configs
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.run import acceptance, assemble
from jeagle.run.draft_init import draft_spec
from jeagle.runtime.mesh import make_mesh
from jeagle.targets import Sampling
from tests import tiny

PARTS = {"embed_tokens": "its embeddings", "norm": "its final norm", "lm_head": "its lm_head"}


class World:
    """A target on one device, and a draft to decode with."""

    def __init__(self, folder):
        config = configs.parse_overrides(RunConfig(name="x"), tiny.flags(folder), program="x", description="x")
        mesh, ids = make_mesh(devices=jax.devices()[:1]), np.arange(1, 300, 3)
        self.loaded = assemble.load_target(config, mesh)
        spec = draft_spec(config, self.loaded.target.spec, len(ids), ())
        tables = assemble.make_tables(self.loaded.target, ids, mesh)
        graphdef, draft = assemble.make_draft(config, spec, self.loaded.target.spec, tables, mesh, "float32")
        models = acceptance.make_models(self.loaded.target.graphdef, graphdef, spec.aux_layers)
        weights = acceptance.Weights(self.loaded.target.state, draft, tables)
        self.bench = acceptance.Bench(self.loaded, models, weights, mesh)
        self.prompts = [np.arange(start, start + 9, dtype=np.int32) for start in (2, 40, 70)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("broken"))


def parameters(state):
    return {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}


def named(parameter: str) -> str:
    """How a message names a parameter of the target."""
    parts = parameter.split(".")
    return PARTS.get(parts[0]) or f"its layer {parts[1]} (counted from 0)"


def planted(state, path, value, at=(..., 3)):
    """The state with this value in every row of a parameter, so that each text meets it, but in one column."""
    put = lambda leaf: leaf.replace(leaf.get_value().at[at].set(value))  # noqa: E731
    return nnx.from_flat_state([(p, put(leaf) if p == path else leaf) for p, leaf in nnx.to_flat_state(state)])


def broken(world, *prefixes):
    """(how a message names it, the target's state with NaN or infinity there) of parameters with these prefixes."""
    state = world.loaded.target.state
    chosen = [(name, path) for name, path in parameters(state).items() if name.startswith(prefixes)]
    for number, (name, path) in enumerate(chosen):
        yield named(name), planted(state, path, (np.nan, np.inf)[number % 2])
    # A single logit, of a token that the draft vocabulary lacks.
    yield named("lm_head"), planted(state, ("lm_head",), np.nan, at=(6,))


def stops(part):
    return pytest.raises(UserError, match=re.escape(f"The target cannot be used: {part} gives numbers"))


def generate(target, prompts, sampling):
    return list(targets.generate(target, prompts, end_token_ids=[1], max_new_tokens=4, batch=4, sampling=sampling))


@pytest.mark.parametrize(
    ("sampling", "prefixes"),
    [(Sampling(), ("embed", "norm", "lm_head", "blocks.3.", "blocks.7.")), (Sampling(1.0, 0.9, 20), ("blocks.3.mlp",))],
    ids=["greedy", "sampled"],
)
def test_generation_stops(world, sampling, prefixes):
    assert len(generate(world.loaded.target, world.prompts, sampling)) == 3
    for part, state in broken(world, *prefixes):
        with stops(part):
            generate(world.loaded.target._replace(state=state), world.prompts, sampling)


def measure(world, bench):
    how = decoding.Decoding(decoding.TreeShape(2))
    return acceptance.measure(bench, world.prompts, how=how, max_new_tokens=6, batch=4)[0]


def test_bench_stops(world):
    assert measure(world, world.bench)["lossless"]
    for part, state in broken(world, "blocks.3.mixer"):
        with stops(part):
            measure(world, world.bench._replace(weights=world.bench.weights._replace(target=state)))


def test_a_draft_of_nan_is_never_accepted(world):
    """Also where its argmax, which is the first entry, stands for what the target says."""
    nothing = jax.tree.map(lambda x: x * jnp.nan, world.bench.weights.draft)
    weights, tables = world.bench.weights, world.bench.weights.tables
    plain = decoding.decode_plain(world.bench.models, weights, world.prompts, tokens=9, batch=4)
    tables = tables._replace(draft_to_target_D=jnp.full_like(tables.draft_to_target_D, int(plain[0].tokens[1])))
    report = measure(world, world.bench._replace(weights=weights._replace(draft=nothing, tables=tables)))
    assert report["accepted_tokens"] == 0 and report["acceptance_length"] == 1.0 and report["lossless"]


def edit(target, change):
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")


def load(target):
    source = targets.open_weights(targets.resolve(str(target)))
    return targets.load_target(source, make_mesh(devices=jax.devices()[:1]), jnp.float32)


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_weights_of_more_layers_than_the_config_says_are_refused(tmp_path, layers):
    target = tiny.write_target(tmp_path / "target", num_hidden_layers=layers)
    with pytest.raises(UserError, match=f"weights have 8 layers, and its config.json says {layers}"):
        load(target)


def test_tensors_that_nobody_reads_are_named(tmp_path, capsys):
    target = tiny.write_target(tmp_path / "target")
    load(target)
    assert "warning" not in capsys.readouterr().err
    bias = np.ones(8, np.float32)
    edit(target, lambda tensors: tensors.update({f"model.layers.{i}.self_attn.q_proj.bias": bias for i in range(8)}))
    load(target)
    said = capsys.readouterr().err
    assert "warning: 8 tensors of the target are not read, such as model.layers.0.self_attn.q_proj.bias," in said


def test_heads_that_predict_further_tokens_are_no_layers(tmp_path, capsys):
    """As DeepSeek-V3 and GLM-4.5 store them; rotary frequencies are in older checkpoints of Llama."""
    target = tiny.write_target(tmp_path / "target")
    names = ("layers.8.eh_proj.weight", "layers.8.mlp.up_proj.weight", "layers.0.self_attn.rotary_emb.inv_freq")
    edit(target, lambda tensors: tensors.update({f"model.{name}": np.ones(2, np.float32) for name in names}))
    load(target)
    assert "warning" not in capsys.readouterr().err
