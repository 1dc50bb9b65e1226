"""Speculative decoding is lossless for every kind of target: whatever is drafted, the text is plain decoding's.

The draft here knows the plain text and is wrong at every third position, so that rounds end at all places and what the
target kept for rejected tokens (keys, latents, recurrent states) must be taken back.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import decoding, targets
from jeagle.runtime.mesh import make_mesh

GOLDENS = Path(__file__).parents[1] / "targets" / "goldens"
CASES = ("llama", "gemma3", "gpt_oss", "llama4", "deepseek_v2", "gemma4_shared_kv", "qwen3_next", "qwen3_5_moe")
NEW, DRAFTED = 24, 4


@pytest.mark.parametrize("case", CASES)
def test_text_is_plain_decoding(case):
    source = targets.open_weights(targets.resolve(str(GOLDENS / case)))
    target = targets.load_target(source, make_mesh(devices=jax.devices()[:1]), "float32")
    model = target.model()

    def verify(weights, cache, tokens, positions, count):
        _, last, cache = model.extend(tokens, positions, cache, (), count)
        return *targets.greedy_and_gap(model, last), jnp.zeros(()), cache

    def propose(text, cache, tokens, positions):
        """The token after the next, but a wrong one at every third position."""
        right = text[jnp.clip(positions + 2, 0, len(text) - 1)]
        choice = jnp.where(positions % 3 == 0, (right + 1) % target.spec.vocab, right)
        return choice, jnp.zeros((*tokens.shape, 1)), cache

    models = decoding.Models(
        target_cache=lambda _, rows, room, rollback: model.empty_cache(rows, room, jnp.float32, rollback),
        draft_cache=lambda _, rows, room: (),
        verify=verify,
        draft_from_aux=lambda text, cache, aux, tokens, positions: propose(text, cache, tokens, positions),
        draft_from_own=lambda text, cache, state, tokens, positions: propose(text, cache, tokens, positions),
    )
    rng = np.random.default_rng(0)
    for length in (3, 9):
        prompt = rng.integers(2, target.spec.vocab, length).astype(np.int32)
        plain = decoding.decode_greedy(models, jnp.zeros(1, jnp.int32), [prompt], tokens=NEW, batch=1, width=12)[0]
        text = jnp.asarray(np.concatenate([prompt, plain.tokens]))
        found = decoding.decode_speculative(
            models,
            text,
            [prompt],
            draft_tokens=DRAFTED,
            max_new_tokens=NEW,
            end_token_ids=(),
            batch=1,
            width=12,
        )[0]
        assert found.tokens == plain.tokens.tolist(), length
        assert 0 < sum(found.rounds) < DRAFTED * len(found.rounds)  # some taken, some taken back
