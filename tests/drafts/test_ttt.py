"""The unroll against a dense reference in float64 that writes down every layer's mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle import align
from jeagle.drafts import Eagle3, unroll
from jeagle.interfaces import Batch, DraftSpec, Rope

STEPS, LENGTH, WINDOW = 4, 14, 3
DOCUMENTS = (9, 5)
FULL, SLIDING = "full_attention", "sliding_attention"


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x, position, theta):
    """[..., heads, C] by one position."""
    half = x.shape[-1] // 2
    angle = position / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


class Dense:
    """One document, slot by slot and key by key: no batching, no merging of softmaxes, no gathered slots."""

    def __init__(self, spec: DraftSpec, draft: Eagle3, fixed_window: bool):
        self.spec, self.fixed_window = spec, fixed_window
        self.draft = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(draft)))

    def run(self, aux_TAH: np.ndarray, embedded_TW: np.ndarray) -> np.ndarray:
        """What lm_head reads: [K, T, W], only valid where slot t reads a token of the document."""
        spec, length = self.spec, len(aux_TAH)
        hidden = aux_TAH.reshape(length, -1) @ self.draft["fc"]
        # keys[layer][step][t] and values alike
        self.keys, self.values = ([[[] for _ in range(STEPS)] for _ in range(spec.layers)] for _ in "kv")
        out = np.zeros((STEPS, length, spec.width))
        for k in range(STEPS):
            stream = hidden.copy()
            for number in range(spec.layers):
                stream = self.layer(number, k, stream, embedded_TW)
            hidden = stream
            out[k] = norm(stream, self.draft["norm"], spec.norm_eps)
        return out

    def layer(self, number: int, k: int, stream: np.ndarray, embedded_TW: np.ndarray) -> np.ndarray:
        spec, layer, length = self.spec, self.draft["layers"][number], len(stream)
        reads = np.minimum(np.arange(length) + 1 + k, length - 1)
        if number == 0:
            embedded = norm(embedded_TW[reads], layer["input_layernorm"], spec.norm_eps)
            read = np.concatenate([embedded, norm(stream, layer["hidden_norm"], spec.norm_eps)], axis=-1)
        else:
            read = norm(stream, layer["input_layernorm"], spec.norm_eps)
        heads = {n: (read @ layer["self_attn"][f"{n}_proj"]).reshape(length, -1, spec.head_dim) for n in "qkv"}
        turned = {n: np.stack([rotate(heads[n][t], t + k, spec.rope.theta) for t in range(length)]) for n in "qk"}
        self.keys[number][k], self.values[number][k] = turned["k"], heads["v"]
        mixed = np.stack([self.attend(number, k, t, turned["q"][t]) for t in range(length)])
        x = stream + mixed.reshape(length, -1) @ layer["self_attn"]["o_proj"]
        normed, mlp = norm(x, layer["post_attention_layernorm"], spec.norm_eps), layer["mlp"]
        gate = normed @ mlp["gate_proj"]
        return x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up_proj"])) @ mlp["down_proj"]

    def attend(self, number: int, k: int, t: int, queries: np.ndarray) -> np.ndarray:
        """Over step-0 keys of slots up to t, at positions 0..t, and the slot's own keys, at positions t + 1..t + k."""
        window = self.spec.sliding_window if self.spec.layer_types[number] == SLIDING else 0
        places = [(0, i) for i in range(t + 1)] + [(j, t) for j in range(1, k + 1)]
        if window and self.fixed_window:  # the step-0 keys that step 0 attends to, and all own keys
            places = [(j, i) for j, i in places if j or i > t - window]
        elif window:
            places = [(j, i) for j, i in places if i + j > t + k - window]
        repeats = self.spec.heads // self.spec.kv_heads
        keys, values = (
            np.repeat(np.stack([rows[number][j][i] for j, i in places]), repeats, axis=1)
            for rows in (self.keys, self.values)
        )
        scores = np.einsum("qc,sqc->qs", queries, keys) / np.sqrt(self.spec.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("qs,sqc->qc", weights / weights.sum(-1, keepdims=True), values)


@pytest.mark.parametrize("fixed_window", [False, True])
@pytest.mark.parametrize("layer_types", [(FULL, SLIDING), (SLIDING, FULL), (SLIDING, SLIDING)])
def test_layers_attend_as_their_types_say(layer_types, fixed_window):
    """Two packed documents, two layers; all slots that read a token of their document, to the rotations' float32."""
    spec = DraftSpec(
        target_width=8,
        width=8,
        target_vocab=20,
        draft_vocab=12,
        aux_layers=(1, 2),
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp_width=12,
        layers=2,
        rope=Rope(100.0),
        sliding_window=WINDOW,
        layer_types=layer_types,
    )
    with jax.enable_x64(True):
        draft = Eagle3(spec, jnp.dtype("float64"), nnx.Rngs(0))
        graphdef, state = nnx.split(draft)
        rng = np.random.default_rng(0)
        state = jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape)), state)
        segments = np.repeat([1, 2], DOCUMENTS)[None]
        positions = np.concatenate([np.arange(n) for n in DOCUMENTS])[None]
        batch = Batch(*map(jnp.asarray, (segments, segments, positions, segments > 0)))
        aux, embedded = rng.standard_normal((1, LENGTH, 2, 8)), rng.standard_normal((1, LENGTH, 8))
        counts = align.counting_slots(batch, STEPS, "predicted")
        slots = align.Selected(jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), bool))
        found = unroll(
            graphdef, state, batch, jnp.asarray(aux), jnp.asarray(embedded), slots, counts, fixed_window=fixed_window
        )
        dense, start = Dense(spec, nnx.merge(graphdef, state), fixed_window), 0
        for length in DOCUMENTS:
            here = slice(start, start + length)
            expected = dense.run(aux[0, here], embedded[0, here])
            for k in range(STEPS):
                reading = slice(start, start + length - 1 - k)
                np.testing.assert_allclose(
                    found.hidden_KBNW[k, 0, reading], expected[k, : length - 1 - k], atol=1e-6, err_msg=f"step {k}"
                )
            start += length


def test_windows_of_layers():
    kwargs = {"heads": 1, "kv_heads": 1, "head_dim": 4, "mlp_width": 4, "layers": 2}
    spec = lambda **more: DraftSpec(4, 4, 9, 9, (1,), **kwargs, **more)  # noqa: E731
    assert spec().windows == (0, 0)
    assert spec(sliding_window=7).windows == (7, 7)
    assert spec(sliding_window=7, layer_types=(SLIDING, FULL)).windows == (7, 0)
    described = spec(sliding_window=7, layer_types=(SLIDING, FULL))
    assert DraftSpec.from_json(described.to_json()) == described
    without = {k: v for k, v in spec().to_json().items() if k != "layer_types"}  # as written before there were types
    assert DraftSpec.from_json(without) == spec()
