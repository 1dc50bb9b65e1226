"""The training view at TTT step k equals k steps of incremental decoding with a KV cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle import align
from jeagle.drafts import Eagle3, advance, empty_cache, unroll
from jeagle.interfaces import Batch, DraftSpec, Rope, Tables

STEPS = 7
LENGTHS = (13, 9)  # two documents packed in one row of 24

LLAMA3 = Rope(
    5e5,
    (
        ("factor", 8.0),
        ("high_freq_factor", 4.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 16),
        ("rope_type", "llama3"),
    ),
)
LONG = Rope(
    1e4,
    (
        ("factor", 4.0),
        ("long_factor", (1.0, 2.0, 3.0, 4.0)),
        ("original_max_position_embeddings", 8),  # both documents outgrow it
        ("rope_type", "longrope"),
        ("short_factor", (1.0, 1.0, 1.1, 1.2)),
    ),
)
FULL, SLIDING = "full_attention", "sliding_attention"
SPECS = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "eagle31": {"norm_before_fc": True, "carry_normed": True},
    "fc_norm": {"fc_norm": True},
    "two_layers": {"layers": 2},
    "qk_norm": {"qk_norm": True, "head_dim": 16},
    "llama3_rope": {"rope": LLAMA3},
    "long_rope": {"rope": LONG},
    "bias": {"attention_bias": True},
    "window": {"sliding_window": 9},
    "window_within_the_steps": {"sliding_window": 3, "layers": 2},
    "windowed_and_full_layers": {"sliding_window": 3, "layers": 2, "layer_types": (SLIDING, FULL)},
    "full_and_windowed_layers": {"sliding_window": 5, "layers": 2, "layer_types": (FULL, SLIDING)},
    "own_width": {"width": 16, "aux_layers": (0, 1, 2, 3, 5), "head_norm": False},
}


def spec_of(**changes) -> DraftSpec:
    base = {
        "target_width": 24,
        "width": 24,
        "target_vocab": 40,
        "draft_vocab": 20,
        "aux_layers": (1, 2, 4),
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 32,
    }
    return DraftSpec(**(base | changes))


def shaken(spec: DraftSpec, dtype=jnp.float32):
    """A draft whose norms and biases are no longer ones and zeros."""
    graphdef, state = nnx.split(Eagle3(spec, dtype, nnx.Rngs(1)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, moved)


def packed_row(rng: np.random.Generator) -> Batch:
    tokens, segments, positions = (np.zeros((1, 24), np.int32) for _ in range(3))
    start = 0
    for number, length in enumerate(LENGTHS, 1):
        here = slice(start, start + length)
        tokens[0, here] = rng.integers(1, 40, length)
        segments[0, here], positions[0, here] = number, np.arange(length)
        start += length
    return Batch(tokens, segments, positions, segments > 0)


def training_view(graphdef, state, batch: Batch, aux_layers, tables: Tables):
    counts = align.counting_slots(batch, STEPS, "predicted")
    slots = align.select(counts.any(axis=0), 20)
    batch = jax.tree.map(jnp.asarray, batch)
    return slots, unroll(graphdef, state, batch, aux_layers, tables.embed_VW[batch.tokens_BT], slots, counts)


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS.keys())
def test_training_view_is_decoding_view(changes):
    spec = spec_of(**changes)
    rng = np.random.default_rng(0)
    graphdef, state = shaken(spec)
    draft = nnx.merge(graphdef, state)
    batch = packed_row(rng)
    aux_layers = jnp.asarray(rng.standard_normal((1, 24, len(spec.aux_layers), 24)), jnp.float32)
    embed = jnp.asarray(rng.standard_normal((40, spec.width)), jnp.float32)
    tables = Tables(embed, jnp.zeros((20, 24)), jnp.arange(20))
    slots, predictions = training_view(graphdef, state, batch, aux_layers, tables)

    @jax.jit
    def step(state, hidden, tokens, positions, cache):
        return advance(nnx.merge(graphdef, state), tables, hidden, tokens, positions, cache)

    compared, start = 0, 0
    for length in LENGTHS:
        document = slice(start, start + length)
        tokens = jnp.asarray(batch.tokens_BT[:, document])
        fused = draft.fuse(aux_layers[:, document])
        cache = empty_cache(draft, 1, 32)
        for t in range(length - 1):
            # Slot t on the target's features; then on its own states, in a copy of the cache that is dropped.
            here = jnp.full((1, 1), t)
            for_head, own, cache = step(state, fused[:, t : t + 1], tokens[:, t + 1 : t + 2], here, cache)
            branch = cache
            for k in range(STEPS):
                if k:
                    if t + 1 + k >= length:
                        break
                    token = tokens[:, t + 1 + k : t + 2 + k]
                    for_head, own, branch = step(state, own, token, here + k, branch)
                n = int(np.argmax(np.asarray(slots.positions_BN[0]) == start + t))
                if slots.positions_BN[0, n] != start + t or not predictions.counts_KBN[k, 0, n]:
                    continue
                trained = np.asarray(predictions.hidden_KBNW[k, 0, n])
                np.testing.assert_allclose(trained, np.asarray(for_head[0, 0]), atol=2e-5)
                compared += 1
        start += length
    assert compared > 60


def test_documents_do_not_see_each_other():
    """Editing the first document leaves every state of the second as it was, at every step."""
    spec, rng = spec_of(), np.random.default_rng(3)
    graphdef, state = shaken(spec)
    batch = packed_row(rng)
    aux_layers = rng.standard_normal((1, 24, 3, 24)).astype(np.float32)
    embed = jnp.asarray(rng.standard_normal((40, 24)), jnp.float32)
    tables = Tables(embed, jnp.zeros((20, 24)), jnp.arange(20))
    _, before = training_view(graphdef, state, batch, jnp.asarray(aux_layers), tables)
    tokens = batch.tokens_BT.copy()
    tokens[0, :13] = rng.integers(1, 40, 13)
    aux_layers[0, :13] = rng.standard_normal((13, 3, 24))
    slots, after = training_view(graphdef, state, batch._replace(tokens_BT=tokens), jnp.asarray(aux_layers), tables)
    second = np.asarray(slots.positions_BN[0]) >= 13
    assert second.any()
    np.testing.assert_array_equal(after.hidden_KBNW[:, :, second], before.hidden_KBNW[:, :, second])
    assert not np.allclose(after.hidden_KBNW[:, :, ~second], before.hidden_KBNW[:, :, ~second])
