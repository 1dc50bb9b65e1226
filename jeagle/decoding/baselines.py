"""What a trained draft is compared with: plain decoding of the target, and drafters that need no model."""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.decoding.speculative import (
    Models,
    SpeculativeAnswer,
    grouped,
    padded_width,
    read_prompts,
)
from jeagle.runtime.sampling import GREEDY, Sampling, sampling_scores, token_keys
from jeagle.runtime.xla_workarounds import argmax_by_blocks

TIE = 1e-4
"""Two scores closer than this count as a tie: rounding may order them either way."""


class NotFiniteError(ArithmeticError):
    """The target's logits were not finite; `tokens` [n] are the prompt and the tokens after it that they came of."""

    def __init__(self, tokens: np.ndarray):
        super().__init__("The target's logits are not finite.")
        self.tokens = tokens


class PlainAnswer(NamedTuple):
    """The target's own tokens after a prompt, without stopping at an end token.

    Attributes:
      tokens: int32 [n].
      gaps: float32 [n], the score of the chosen token minus the second largest one; NaN if the scores are not finite.
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
    sampling: Sampling = GREEDY,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[PlainAnswer]:
    """`tokens` tokens after each prompt, one forward pass of the target each; answers in the prompts' order.

    Args:
      batch: prompts that are decoded side by side.
      width: prompts are padded to at least so many tokens, as in `speculative.decode_speculative`.
      sampling, seed: with the same ones, the rule "target" of `decode_speculative` gives the same text.
      on_done: called with the number of prompts that are done.

    Raises:
      NotFiniteError: after the first prompts for which the target's logits are not finite.
    """
    width, key = max(padded_width(prompts), width), jax.random.key(seed)
    answers: dict[int, PlainAnswer] = {}
    for chosen, padded, lengths in grouped(prompts, batch, width):
        numbers = jnp.array([*chosen, *[chosen[0]] * (batch - len(chosen))], jnp.uint32)
        decoded = _plain(models, weights, padded, lengths, numbers, key, tokens, width + tokens + 1, sampling)
        written, gaps = jax.device_get(decoded)
        answers |= {i: PlainAnswer(written[:, row], gaps[:, row]) for row, i in enumerate(chosen)}
        for i in chosen:
            if np.isnan(answers[i].gaps).any():
                raise NotFiniteError(np.concatenate([prompts[i], answers[i].tokens]))
        on_done(len(answers))
    return [answers[i] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("models", "tokens", "cache_length", "sampling"))
def _plain(models, weights, padded, lengths_B, numbers_B, key, tokens: int, cache_length: int, sampling: Sampling):
    def choose(logits_BV: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The token that the target chooses, and the lead of its score."""
        keys_B = token_keys(key, numbers_B, jnp.broadcast_to(count, (len(numbers_B), 1)))[:, 0]
        scores_BV = sampling_scores(logits_BV, keys_B, sampling)
        token_B = argmax_by_blocks(scores_BV).astype(jnp.int32)
        best_B = scores_BV.max(axis=-1)
        others = jnp.where(jnp.arange(scores_BV.shape[-1]) == token_B[:, None], -jnp.inf, scores_BV)
        return token_B, jnp.where(jnp.isfinite(best_B), best_B - others.max(axis=-1), jnp.nan)

    def step(carry: Any, count: jax.Array):
        cache, token_B = carry
        position_B = lengths_B + count - 1
        last, _, cache = models.read(weights, cache, token_B[:, None], position_B[:, None], None, None)
        chosen = choose(models.logits(weights, last)[:, 0], count)
        return (cache, chosen[0]), chosen

    logits_BV, _, cache, _ = read_prompts(models, weights, padded, lengths_B, cache_length, 0)
    first = choose(logits_BV, jnp.zeros((), jnp.int32))
    _, rest = jax.lax.scan(step, (cache, first[0]), jnp.arange(1, tokens))
    return tuple(jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))


class Comparison(NamedTuple):
    """Whether two answers are equal; a difference is excused where the two best scores of plain decoding tie."""

    equal: bool
    excused: bool


def compare_answers(speculative: SpeculativeAnswer, plain: PlainAnswer) -> Comparison:
    """Compares token for token over the speculative answer's length; the first difference decides."""
    for position, token in enumerate(speculative.tokens):
        if token != plain.tokens[position]:
            return Comparison(False, bool(plain.gaps[position] < TIE))
    return Comparison(True, False)


class Drafter(Protocol):
    """Proposes tokens without a model."""

    def draft(self, context: Sequence[int], tokens: int) -> list[int]:
        """At most `tokens` tokens after `context`."""
        ...


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


class PromptLookup:
    """Drafts what followed the latest earlier occurrence of the text's last tokens.

    Source: Saxena's prompt lookup decoding, vLLM's "ngram" and SGLang's "NGRAM" method; the longest match wins.

    Attributes:
      longest: largest number of tokens that are looked for.
    """

    def __init__(self, longest: int = 3):
        self.longest = longest

    def draft(self, context: Sequence[int], tokens: int) -> list[int]:
        """At most `tokens` tokens after `context`."""
        text = np.asarray(context)
        for length in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
            matches = np.flatnonzero((windows == text[-length:]).all(axis=1))
            if len(matches):
                begin = matches[-1] + length
                return text[begin : begin + tokens].tolist()
        return []


class FirstThatDrafts:
    """Drafts with the first of several drafters that has anything to propose."""

    def __init__(self, *drafters: Drafter):
        self.drafters = drafters

    def draft(self, context: Sequence[int], tokens: int) -> list[int]:
        """At most `tokens` tokens after `context`."""
        return next((drafted for d in self.drafters if (drafted := d.draft(context, tokens))), [])


def decode_without_draft_model(
    drafter: Drafter, prompt: np.ndarray, plain: np.ndarray, answer: int, draft_tokens: int
) -> SpeculativeAnswer:
    """Speculative decoding of a known text of the target with a drafter; the target is not run.

    Args:
      plain: the target's tokens, at least `draft_tokens` more than the answer.
      answer: how many of them the answer has.
    """
    text, position, rounds = [*prompt.tolist(), *plain.tolist()], len(prompt) + 1, []
    while position < len(prompt) + answer:
        drafted = drafter.draft(text[:position], draft_tokens)
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == text[position + accepted]:
            accepted += 1
        rounds.append(accepted)
        position += accepted + 1
    return SpeculativeAnswer(plain[:answer].tolist(), rounds)
