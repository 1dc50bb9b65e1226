"""What a trained draft is compared with: greedy decoding of the target alone, and an n-gram table as the draft."""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.decoding.chain import Models, SpeculativeAnswer, grouped, padded_width

TIE = 1e-4
"""Two logits closer than this count as a tie: rounding may order them either way."""


class NotFiniteError(ArithmeticError):
    """The target's logits were not finite; `tokens` [n] are the prompt and the tokens after it that they came of."""

    def __init__(self, tokens: np.ndarray):
        super().__init__("The target's logits are not finite.")
        self.tokens = tokens


class GreedyAnswer(NamedTuple):
    """The target's greedy tokens after a prompt, without stopping at an end token.

    Attributes:
      tokens: int32 [n].
      gaps: float32 [n], the chosen logit minus the second largest one.
    """

    tokens: np.ndarray
    gaps: np.ndarray


def decode_greedy(
    models: Models,
    weights: Any,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    batch: int,
    width: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[GreedyAnswer]:
    """`tokens` greedy tokens after each prompt, one forward pass of the target each; answers in the prompts' order.

    Args:
      batch: prompts that are decoded side by side.
      width: prompts are padded to at least so many tokens, as in `chain.decode_speculative`.
      on_done: called with the number of prompts that are done.

    Raises:
      NotFiniteError: after the first prompts for which the target's logits are not finite.
    """
    width = max(padded_width(prompts), width)
    answers: dict[int, GreedyAnswer] = {}
    for chosen, padded, lengths in grouped(prompts, batch, width):
        written, gaps = jax.device_get(_greedy(models, weights, padded, lengths, tokens, width + tokens + 1))
        answers |= {i: GreedyAnswer(written[:, row], gaps[:, row]) for row, i in enumerate(chosen)}
        for i in chosen:
            if not np.isfinite(answers[i].gaps).all():
                raise NotFiniteError(np.concatenate([prompts[i], answers[i].tokens]))
        on_done(len(answers))
    return [answers[i] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("models", "tokens", "cache_length"))
def _greedy(models: Models, weights: Any, padded: jax.Array, lengths: jax.Array, tokens: int, cache_length: int):
    positions = jnp.broadcast_to(jnp.arange(padded.shape[1]), padded.shape)
    cache = models.target_cache(weights, padded.shape[0], cache_length, 0)
    greedy, gap, _, cache = models.verify(weights, cache, padded, positions, lengths)
    last = (lengths - 1)[:, None]
    first = tuple(jnp.take_along_axis(x, last, axis=1)[:, 0] for x in (greedy, gap))

    def step(carry: Any, _: None):
        cache, token, position = carry
        greedy, gap, _, cache = models.verify(weights, cache, token[:, None], position[:, None], None)
        return (cache, greedy[:, 0], position + 1), (greedy[:, 0], gap[:, 0])

    _, rest = jax.lax.scan(step, (cache, first[0], lengths), None, length=tokens - 1)
    return tuple(jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))


class Comparison(NamedTuple):
    """Whether two answers are equal; a difference is excused where the two best logits of greedy decoding tie."""

    equal: bool
    excused: bool


def compare_answers(speculative: SpeculativeAnswer, greedy: GreedyAnswer) -> Comparison:
    """Compares token for token over the speculative answer's length; the first difference decides."""
    for position, token in enumerate(speculative.tokens):
        if token != greedy.tokens[position]:
            return Comparison(False, bool(greedy.gaps[position] < TIE))
    return Comparison(True, False)


class NGramTable:
    """For each pair of tokens and each single token, the token that most often follows it in the training answers.

    Ties go to the lower id. For a pair that never occurred, the table uses its last token alone; after a token that
    never occurred, the draft ends.
    """

    def __init__(self, documents: Iterable[tuple[np.ndarray, np.ndarray]]):
        """Counts followers in (ids, supervised) of the training conversations; only supervised tokens are followers."""
        followers: dict[tuple[int, ...], collections.Counter] = collections.defaultdict(collections.Counter)
        for ids, supervised in documents:
            ids = ids.tolist()
            for position in np.flatnonzero(supervised).tolist():
                for order in (1, 2):
                    if position >= order:
                        followers[tuple(ids[position - order : position])][ids[position]] += 1
        self._next = {c: min(f.items(), key=lambda kv: (-kv[1], kv[0]))[0] for c, f in followers.items()}

    def draft(self, context: Sequence[int], tokens: int) -> list[int]:
        """At most `tokens` tokens after `context`."""
        context, drafted = list(context[-2:]), []
        while len(drafted) < tokens:
            token = self._next.get(tuple(context[-2:]), self._next.get(tuple(context[-1:])))
            if token is None:
                break
            drafted.append(token)
            context.append(token)
        return drafted


def decode_ngram(
    table: NGramTable, prompt: np.ndarray, greedy: np.ndarray, answer: int, draft_tokens: int
) -> SpeculativeAnswer:
    """Speculative decoding of a known greedy text with the table as the draft; the target is not run.

    Args:
      greedy: the target's tokens, at least `draft_tokens` more than the answer.
      answer: how many of them the answer has.
    """
    text, position, rounds = [*prompt.tolist(), *greedy.tolist()], len(prompt) + 1, []
    while position < len(prompt) + answer:
        drafted = table.draft(text[:position], draft_tokens)
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == text[position + accepted]:
            accepted += 1
        rounds.append(accepted)
        position += accepted + 1
    return SpeculativeAnswer(greedy[:answer].tolist(), rounds)
