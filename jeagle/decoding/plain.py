"""Plain greedy decoding: the text that speculative decoding must reproduce."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.decoding.chain import Measured, Models, padded_width


class Plain(NamedTuple):
    """A greedy answer that runs on past its end, so that baselines can be measured to the last token.

    Attributes:
      tokens: int32 [n].
      gaps: float32 [n]: how far the chosen logit lay above the next best.
    """

    tokens: np.ndarray
    gaps: np.ndarray


def decode_plain(
    models: Models,
    weights: Any,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    batch: int,
    width: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Plain]:
    """`tokens` greedy tokens after each prompt, one forward each, end tokens not heeded; in the prompts' order.

    `width` as in `chain.decode`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    width = max(padded_width(prompts), width)
    results: dict[int, Plain] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = np.zeros((batch, width), np.int32)
        lengths = np.ones(batch, np.int32)
        for row, i in enumerate(chosen):
            padded[row, : len(prompts[i])], lengths[row] = prompts[i], len(prompts[i])
        written, gaps = jax.device_get(_greedy(models, weights, padded, lengths, tokens, width + tokens + 1))
        for row, i in enumerate(chosen):
            results[i] = Plain(written[:, row], gaps[:, row])
        on_done(min(start + batch, len(order)))
    return [results[i] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("models", "tokens", "room"))
def _greedy(models: Models, weights: Any, padded: jax.Array, lengths: jax.Array, tokens: int, room: int):
    positions = jnp.broadcast_to(jnp.arange(padded.shape[1]), padded.shape)
    cache = models.target_cache(weights, padded.shape[0], room, 0)
    greedy, gap, _, cache = models.verify(weights, cache, padded, positions, lengths)
    last = (lengths - 1)[:, None]
    first = tuple(jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (greedy, gap))

    def one(carry: Any, _: None):
        cache, token, position = carry
        greedy, gap, _, cache = models.verify(weights, cache, token[:, None], position[:, None], None)
        return (cache, greedy[:, 0], position + 1), (greedy[:, 0], gap[:, 0])

    _, rest = jax.lax.scan(one, (cache, first[0], lengths), None, length=tokens - 1)
    return tuple(jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))


class Comparison(NamedTuple):
    """Whether two answers agree; a difference is excused where plain decoding's best two logits nearly tie."""

    equal: bool
    excused: bool


def compare(speculative: Measured, plain: Plain, *, tie: float = 1e-4) -> Comparison:
    """Token for token over the speculative answer's length."""
    for place, token in enumerate(speculative.tokens):
        if token != plain.tokens[place]:
            return Comparison(False, bool(plain.gaps[place] < tie))
    return Comparison(True, False)
