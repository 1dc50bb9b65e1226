"""A target with numbers that are not finite stops every command in its first batch, and the message names the layer."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jeagle import bench, decoding, drafts, objective, regenerate, targets, train
from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.run import acceptance, assemble
from jeagle.runtime.mesh import make_mesh
from jeagle.targets import Sampling
from tests import tiny

LAYERED = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
PLANTED = {  # the tensor, and how the message names it
    "model.embed_tokens.weight": "its embeddings",
    "model.norm.weight": "its final norm",
    "lm_head.weight": "its lm_head",
} | {
    f"model.layers.{layer}.{LAYERED[layer % len(LAYERED)]}.weight": f"its layer {layer} (counted from 0)"
    for layer in range(tiny.LAYERS)
}


def plant(target, name, value):
    """Every row, so that each text meets it, but a single column."""
    tensors = load_file(target / "model.safetensors")
    tensors[name][..., 3] = value
    save_file(tensors, target / "model.safetensors")


@pytest.fixture
def target(tmp_path):
    return tiny.write_target(tmp_path / "target")


def load(folder, **mesh):
    source = targets.open_weights(targets.resolve(str(folder)))
    return targets.load_target(source, make_mesh(**mesh), jnp.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", PLANTED)
def test_generation_stops_and_names_the_layer(target, name, value):
    plant(target, name, value)
    loaded, prompts = load(target), [np.arange(5, dtype=np.int32), np.arange(9, 20, dtype=np.int32)]
    for sampling in (Sampling(), Sampling(1.0, 0.9, 20)):
        with pytest.raises(UserError, match=re.escape(f"cannot be used: {PLANTED[name]} gives numbers")):
            list(targets.generate(loaded, prompts, end_token_ids=[1], max_new_tokens=4, batch=2, sampling=sampling))
