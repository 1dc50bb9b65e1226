"""The decoder against transformers' numbers (a golden of SmolLM2), and against itself."""

from __future__ import annotations

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import targets
from jeagle.runtime.mesh import make_mesh
from tests import tiny

GOLDEN = Path(__file__).parents[2] / "goldens" / "smollm2_135m.npz"


@pytest.fixture(scope="module")
def smollm2(smollm2_files):
    return targets.load_target(targets.open_weights(smollm2_files), make_mesh(devices=jax.devices()[:1]), "float32")


def test_smollm2_equals_transformers(smollm2):
    golden = np.load(GOLDEN)
    tokens = jnp.asarray(golden["ids"], jnp.int32)[None]
    positions = jnp.arange(tokens.shape[1])[None]
    aux_layers = tuple(range(smollm2.spec.layers + 1))
    model = smollm2.model()
    streams, last = jax.jit(lambda t, p: model.forward(t, p, jnp.ones_like(t), aux_layers))(tokens, positions)
    places = golden["positions"]
    for layer in range(smollm2.spec.layers):
        theirs = golden["hidden"][layer]
        ours = np.asarray(streams[0, places, layer])
        # Each position by itself: the first one's activations are a thousand times the others'.
        scale = np.abs(theirs).max(axis=-1, keepdims=True)
        assert (np.abs(ours - theirs) / scale).max() < 1e-3, layer
    theirs = golden["hidden"][smollm2.spec.layers]
    assert (np.abs(np.asarray(last[0, places]) - theirs) / np.abs(theirs).max(-1, keepdims=True)).max() < 1e-3
    logits = np.asarray(model.logits(last[0]))
    np.testing.assert_array_equal(logits.argmax(-1), golden["argmax"])
    theirs = golden["logits"]
    assert np.abs(logits[golden["logit_positions"]] - theirs).max() < 1e-3 * np.abs(theirs).max()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny.write_target(tmp_path_factory.mktemp("tiny") / "target")
    return targets.open_weights(targets.resolve(str(folder)))


def row(rng):
    tokens = jnp.asarray(rng.integers(2, 300, (2, 16)), jnp.int32)
    segments = jnp.asarray([[1] * 9 + [2] * 7, [1] * 5 + [2] * 8 + [0] * 3])
    positions = jnp.asarray([[*range(9), *range(7)], [*range(5), *range(8), 0, 0, 0]])
    return tokens, positions, segments


def forward(target, tokens, positions, segments):
    model = target.model()
    aux_layers, last = jax.jit(lambda t, p, s: model.forward(t, p, s, (0, 2, 4, 8)))(tokens, positions, segments)
    return np.asarray(aux_layers), np.asarray(last)


def test_stacked_layers_unrolled_layers_and_meshes_agree(source):
    args = row(np.random.default_rng(0))
    one = make_mesh(devices=jax.devices()[:1])
    wanted = forward(targets.load_target(source, one, "float32", stacked=False), *args)
    meshes = [(one, True), (make_mesh(data=1, fsdp=4, tensor=2), True), (make_mesh(data=2, fsdp=2, tensor=2), False)]
    for mesh, stacked in meshes:
        target = targets.load_target(source, mesh, "float32", stacked=stacked)
        for ours, theirs in zip(forward(target, *args), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_weights_are_really_split(source):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    target = targets.load_target(source, mesh, "float32", stacked=True)
    kernel = target.model().blocks[0].mlp.up_proj.kernel[...]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


@pytest.mark.parametrize("stacked", [True, False])
def test_cached_decoding_equals_the_full_forward(source, stacked):
    target = targets.load_target(source, make_mesh(devices=jax.devices()[:1]), "float32", stacked=stacked)
    tokens = jnp.asarray(np.random.default_rng(1).integers(2, 300, (2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    aux_layers, last = forward(target, tokens, positions, jnp.ones_like(tokens))
    model = target.model()
    cache = model.empty_cache(2, 16, jnp.float32)
    extend = jax.jit(lambda t, p, c: model.extend(t, p, c, (0, 2, 4, 8)))
    for here in (slice(0, 7), slice(7, 8), slice(8, 12)):
        aux, final, cache = extend(tokens[:, here], positions[:, here], cache)
        np.testing.assert_allclose(aux, aux_layers[:, here], atol=2e-5)
        np.testing.assert_allclose(final, last[:, here], atol=2e-5)


def test_packed_documents_equal_documents_alone(source):
    target = targets.load_target(source, make_mesh(devices=jax.devices()[:1]), "float32")
    tokens, positions, segments = row(np.random.default_rng(2))
    _, packed = forward(target, tokens, positions, segments)
    _, alone = forward(target, tokens[:1, 9:], positions[:1, 9:], segments[:1, 9:])
    np.testing.assert_allclose(packed[:1, 9:], alone, atol=2e-5)


def test_generation_is_greedy_whatever_the_batch(source):
    target = targets.load_target(source, make_mesh(devices=jax.devices()[:1]), "float32")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, 300, rng.integers(3, 20)).astype(np.int32) for _ in range(11)]
    model = target.model()
    logits = jax.jit(lambda t: model.logits(model.forward(t, jnp.arange(48)[None], jnp.ones_like(t), ())[1]))
    for batch in (3, 16):
        answers = targets.generate(target, prompts, end_token_ids=(1,), max_new_tokens=12, batch=batch)
        found = {a.index: a for a in answers}
        assert sorted(found) == list(range(11))
        for index, prompt in enumerate(prompts):
            text = prompt.tolist()
            for token in found[index].tokens.tolist():
                padded = jnp.asarray([text + [0] * (48 - len(text))])
                assert token == int(np.argmax(logits(padded)[0, len(text) - 1]))
                text.append(token)
            ended = found[index].tokens[-1] == 1
            assert found[index].finish_reason == ("stop" if ended else "length")
            assert ended or len(found[index].tokens) == 12


def test_likeliest_tokens_of_every_position_asked_for():
    """Of more positions than a chunk has: ids, log-probabilities over the whole vocabulary, what all others have."""
    rng = np.random.default_rng(0)
    last, head = rng.standard_normal((2, 301, 8), np.float32), rng.standard_normal((640, 8), np.float32)
    model = types.SimpleNamespace(logits=lambda states: states @ head.T)
    greedy, lse, top = jax.jit(lambda last: targets.distributions(model, last, 5))(last)
    exact = jax.nn.log_softmax(last @ head.T)
    order = np.argsort(-exact, axis=-1)[..., :5]
    np.testing.assert_array_equal(top.ids_BTP, order)
    np.testing.assert_array_equal(top.ids_BTP[..., 0], greedy)
    kept = np.take_along_axis(np.asarray(exact), order, axis=-1)
    np.testing.assert_allclose(top.log_probs_BTP, kept, atol=1e-5)
    np.testing.assert_allclose(top.rest_BT, 1 - np.exp(kept).sum(-1), atol=1e-5)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(last @ head.T, axis=-1), rtol=1e-5)
