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
from jeagle.decoding import Decoding, TreeShape
from jeagle.runtime.mesh import make_mesh
from jeagle.runtime.sampling import Sampling

GOLDENS = Path(__file__).parents[1] / "targets" / "goldens"
CASES = ("llama", "gemma3", "gpt_oss", "llama4", "deepseek_v2", "gemma4_shared_kv", "qwen3_next", "qwen3_5_moe")
NEW = 24
CHAIN = Decoding(TreeShape(4))
TREE = Decoding(TreeShape(4, top_k=3, verify=9))
SAMPLED = Sampling(0.9, top_p=0.95, top_k=20)


def models_of(target: targets.Target) -> decoding.Models:
    """The target, and a draft whose state is the position and whose "weights" are the whole text."""
    model, vocab = target.model(), target.spec.vocab

    def read(text, cache, tokens, positions, count, view):
        _, last, cache = model.extend(tokens, positions, cache, (), count, view)
        return last, jnp.zeros((*tokens.shape, 1, 1)), cache

    def propose(text, cache, hidden, tokens, positions, view):
        """The token after the next, but a wrong one at every third position, where the right one comes second."""
        return positions[..., None], jnp.zeros((*tokens.shape, 1)), cache

    def logits(text, positions):
        right = text[jnp.clip(positions + 2, 0, len(text) - 1)]
        wrong = positions % 3 == 0
        first, second = jnp.where(wrong, (right + 1) % vocab, right), jnp.where(wrong, right, (right + 1) % vocab)
        ids = jnp.arange(vocab)
        return 2.0 * (ids == first) + 1.0 * (ids == second)

    return decoding.Models(
        target_cache=lambda _, rows, room, rollback: model.empty_cache(rows, room, jnp.float32, rollback),
        read=read,
        logits=lambda _, last: model.logits(last),
        move_slots=lambda _, *slots: model.move_slots(*slots),
        draft_cache=lambda _, rows, room: (),
        fuse=lambda _, aux: aux[:, :, 0],
        draft=propose,
        draft_logits=logits,
        draft_ids=lambda _: jnp.arange(vocab),
    )


@pytest.mark.parametrize("case", CASES)
def test_text_is_plain_decoding(case):
    source = targets.open_weights(targets.resolve(str(GOLDENS / case)))
    target = targets.load_target(source, make_mesh(devices=jax.devices()[:1]), "float32")
    models, rng = models_of(target), np.random.default_rng(0)
    shapes = [CHAIN] if target.spec.is_recurrent else [CHAIN, TREE]
    sampled = [(9, SAMPLED)] if case in ("llama", "qwen3_next") else []
    for length, sampling in [(3, Sampling()), (9, Sampling()), *sampled]:
        prompt = rng.integers(2, target.spec.vocab, length).astype(np.int32)
        options = {"batch": 1, "width": 12, "seed": 7}
        plain = decoding.decode_plain(models, jnp.zeros(1, int), [prompt], tokens=NEW, sampling=sampling, **options)[0]
        text = jnp.asarray(np.concatenate([prompt, plain.tokens]))
        accepted = []
        for how in shapes:
            how = Decoding(how.shape, sampling)
            answer = decoding.decode_speculative(
                models, text, [prompt], decoding=how, max_new_tokens=NEW, end_token_ids=(), **options
            )[0]
            assert answer.tokens == plain.tokens.tolist(), (length, how)
            assert sum(answer.rounds) > 0
            accepted.append(sum(answer.rounds) / len(answer.rounds))
        assert accepted[0] < CHAIN.shape.steps  # some of the chain was taken back
        assert len(accepted) == 1 or accepted[1] > accepted[0]  # the tree holds what the chain has wrong
