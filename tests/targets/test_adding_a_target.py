"""The family in docs/adding_a_target.md runs as it is, and gives the numbers of a forward pass in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jeagle import targets
from jeagle.config import RunConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.run import assemble
from jeagle.runtime.mesh import make_mesh
from tests import tiny

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_target.md"
WIDTH, HEADS, KV_HEADS, INNER, LAYERS, WINDOW, DIVISOR = 32, 4, 2, 48, 3, 5, 4.0
HEAD_DIM = WIDTH // HEADS


@pytest.fixture(scope="module")
def acorn(tmp_path_factory) -> Path:
    """A folder with the document's module and, in `target`, a random checkpoint of that family."""
    folder = tmp_path_factory.mktemp("acorn")
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) < 80
    (folder / "acorn.py").write_text(code)
    target = folder / "target"
    target.mkdir()
    vocab = tiny.write_tokenizer(target)
    config = {"architectures": ["AcornForCausalLM"], "vocab_size": vocab, "d_model": WIDTH, "d_ff": INNER}
    config |= {"n_heads": HEADS, "n_kv_heads": KV_HEADS, "n_layers": LAYERS, "window": WINDOW, "activation": "silu"}
    config |= {"rope_base": 500.0, "logit_divisor": DIVISOR, "context": 64, "eos_token_id": 1}
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors(vocab), target / "model.safetensors")
    return folder


def tensors(vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"tok.weight": (vocab, WIDTH), "head.weight": (vocab, WIDTH), "norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attn.wqkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH),
            f"layers.{i}.attn.wo.weight": (WIDTH, WIDTH),
            f"layers.{i}.mlp.w_in.weight": (2 * INNER, WIDTH),
            f"layers.{i}.mlp.w_out.weight": (WIDTH, INNER),
            f"layers.{i}.norm1.weight": (WIDTH,),
            f"layers.{i}.norm2.weight": (WIDTH,),
        }
    return {name: (rng.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}


def by_hand(weights: dict[str, np.ndarray], tokens_T: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """-> states [T, H] before the first layer and after each, the final norm's output, the logits; in float64."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    length = len(tokens_T)

    def normed(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[name]

    def rotated(x):
        angles = np.arange(length)[:, None, None] / 500.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        low, high = np.split(x, 2, -1)
        return np.concatenate(
            [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], -1
        )

    back = np.arange(length)[:, None] - np.arange(length)
    x = weights["tok.weight"][tokens_T]
    states = [x]
    for i in range(LAYERS):
        qkv = normed(x, f"layers.{i}.norm1.weight") @ weights[f"layers.{i}.attn.wqkv.weight"].T
        heads = qkv.reshape(length, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = np.split(heads, [HEADS, HEADS + KV_HEADS], 1)
        k, v = (np.repeat(part, HEADS // KV_HEADS, 1) for part in (rotated(k), v))
        seen = (back >= 0) & (back < (WINDOW if i % 2 else length))
        scores = np.where(seen, np.einsum("tnc,snc->nts", rotated(q), k) / np.sqrt(HEAD_DIM), -np.inf)
        weighed = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snc->tnc", weighed / weighed.sum(-1, keepdims=True), v).reshape(length, WIDTH)
        x = x + mixed @ weights[f"layers.{i}.attn.wo.weight"].T
        gate, up = np.split(normed(x, f"layers.{i}.norm2.weight") @ weights[f"layers.{i}.mlp.w_in.weight"].T, 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"layers.{i}.mlp.w_out.weight"].T
        states.append(x)
    last = normed(x, "norm.weight")
    return states, last, last @ weights["head.weight"].T / DIVISOR


def run_config(acorn: Path, family: str = "acorn:ACORN") -> RunConfig:
    return RunConfig("acorn", target=TargetConfig(ref=str(acorn / "target"), dtype="float32", family=family))


def test_the_documents_family_gives_the_numbers_of_its_own_forward_pass(acorn, monkeypatch):
    monkeypatch.syspath_prepend(acorn)
    loaded = assemble.load_target(run_config(acorn), make_mesh(devices=jax.devices()[:1]))
    weights = tensors(loaded.target.spec.vocab)
    one, other = (np.random.default_rng(seed).integers(0, loaded.target.spec.vocab, n) for seed, n in ((1, 9), (2, 7)))
    packed = jnp.asarray(np.concatenate([one, other]), jnp.int32)[None]
    positions = jnp.asarray([*range(9), *range(7)], jnp.int32)[None]
    segments = jnp.asarray([1] * 9 + [2] * 7, jnp.int32)[None]
    model = loaded.target.model()
    aux_layers, last = model.forward(packed, positions, segments, tuple(range(LAYERS + 1)))
    logits = model.logits(last)
    for tokens, here in ((one, slice(0, 9)), (other, slice(9, 16))):
        states, normed, expected = by_hand(weights, tokens)
        ours = [
            *np.moveaxis(np.asarray(aux_layers[0, here]), 1, 0),
            np.asarray(last[0, here]),
            np.asarray(logits[0, here]),
        ]
        for mine, exact in zip(ours, [*states, normed, expected], strict=True):
            assert np.abs(mine - exact).max() < 2e-6 * np.abs(exact).max()
    assert loaded.end_token_ids == (1,)


def test_it_writes_what_its_forward_pass_would(acorn, monkeypatch):
    """Greedy generation with a cache, longer than the window."""
    monkeypatch.syspath_prepend(acorn)
    target = assemble.load_target(run_config(acorn), make_mesh(devices=jax.devices()[:1])).target
    weights, prompt = tensors(target.spec.vocab), np.array([5, 90, 17], np.int32)
    (answer,) = targets.generate(target, [prompt], end_token_ids=(), max_new_tokens=9, batch=1)
    text = prompt
    for token in answer.tokens:
        assert token == by_hand(weights, text)[2][-1].argmax()
        text = np.append(text, token)


def test_a_key_that_the_family_does_not_read_is_refused(acorn, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(acorn)
    config = json.loads((acorn / "target" / "config.json").read_text())
    with pytest.raises(UserError, match="sharpness = 2, which jeagle does not know for AcornForCausalLM"):
        targets.read_spec(config | {"sharpness": 2}, targets.own_family("acorn:ACORN"))
    with pytest.raises(UserError, match="activation = 'relu'.*not supported for AcornForCausalLM"):
        targets.read_spec(config | {"activation": "relu"}, targets.own_family("acorn:ACORN"))


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("acorns:ACORN", "acorns:ACORN cannot be imported .*give package.module:NAME"),
        ("acorn:OAK", "acorn:OAK cannot be imported"),
        ("acorn", "acorn cannot be imported"),
        ("acorn:read", "acorn:read is a function; it must be a jeagle.targets.Family"),
    ],
)
def test_an_invalid_family_gives_one_sentence(acorn, monkeypatch, family, said):
    monkeypatch.syspath_prepend(acorn)
    with pytest.raises(UserError, match=said) as error:
        targets.own_family(family)
    assert "\n" not in str(error.value)
