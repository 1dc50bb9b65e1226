"""Speculative decoding with a chain of drafted tokens at temperature 0, many prompts side by side.

The committed tokens are x_0 .. x_{n-1}; the target has read all but the last one. A round drafts d_1 .. d_K, verifies
them by having the target read x_{n-1}, d_1 .. d_K at once, and commits the drafted tokens that equal the target's own
greedy tokens, and one more token of the target's:

    draft slot n-2   reads x_{n-1}, the target's features at n-2     -> d_1
    draft slot n-1.. reads d_j, its own last state                   -> d_{j+1}
    target           reads x_{n-1} d_1 .. d_K                        -> g_0 .. g_K
    d_1 .. d_a equal g_0 .. g_{a-1}: g_0 .. g_a are committed, and n grows by a + 1

Source: Leviathan et al. (arXiv 2211.17192) at temperature 0; EAGLE-3 (arXiv 2503.01840) for the draft's inputs.
Counters are vLLM's: the first token, from the prompt's prefill, belongs to no round, and a round counts in full even if
the answer ends inside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.align import shift_left

WIDTH_STEP = 32
"""Prompts are padded to a multiple of it, so that few shapes are compiled."""


class Models(NamedTuple):
    """The two models as functions of their weights; static under jit.

    Attributes:
      target_cache: (weights, rows, length, rollback) -> an empty cache that can be rolled back by `rollback` tokens.
      draft_cache: (weights, rows, length) -> an empty cache.
      verify: (weights, cache, tokens_BT, positions_BT, count_B or None) -> (greedy_BT, gap_BT, aux, cache): the target.
        The gap is the largest logit minus the second; the count is the number of real tokens in a row; aux are the aux
        hidden states.
      draft_from_aux: (weights, cache, aux, tokens_BT, positions_BT) -> (greedy_BT, hidden_BTW, cache): the draft on the
        target's aux hidden states.
      draft_from_own: (weights, cache, hidden_B1W, tokens_B1, positions_B1) -> (greedy_B1, hidden_B1W, cache): the draft
        on its own hidden state.
    """

    target_cache: Callable[..., Any]
    draft_cache: Callable[..., Any]
    verify: Callable[..., Any]
    draft_from_aux: Callable[..., Any]
    draft_from_own: Callable[..., Any]


class DecodingState(NamedTuple):
    """The state of B sequences between rounds."""

    target_cache: Any
    draft_cache: Any
    length_B: jax.Array  # n: committed tokens
    last_B: jax.Array  # x_{n-1}
    first_draft_B: jax.Array  # d_1
    hidden_BW: jax.Array  # the draft's hidden state that gave d_1


@dataclasses.dataclass
class SpeculativeAnswer:
    """The answer to a prompt, and how it was drafted.

    Attributes:
      tokens: the answer, the end token included.
      rounds: the number of accepted draft tokens of each verification.
    """

    tokens: list[int]
    rounds: list[int]


def decode_speculative(
    models: Models,
    weights: Any,
    prompts: Sequence[np.ndarray],
    *,
    draft_tokens: int,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    batch: int,
    width: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[SpeculativeAnswer]:
    """Decodes all prompts speculatively; answers in the prompts' order.

    Args:
      draft_tokens: K, tokens that are drafted before each verification.
      end_token_ids: an answer ends with the first of them, or after `max_new_tokens`.
      batch: prompts that are decoded side by side.
      width: prompts are padded to the longest one or to `width`, whichever is larger; calls with one width share their
        compiled programs.
      on_done: called with the number of prompts that are done.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    width = max(padded_width(prompts), width)
    cache_length = width + max_new_tokens + 2 * draft_tokens + 2
    answers: dict[int, SpeculativeAnswer] = {}
    done = 0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        group = _Group([prompts[i] for i in chosen], batch, max_new_tokens, set(end_token_ids))
        state, first = _prefill(models, weights, *group.padded(width), draft_tokens, cache_length)
        group.add_round(np.asarray(first)[:, None], np.zeros(batch, int), count=False)
        while group.active():
            state, greedy, accepted = _round(models, weights, state, draft_tokens, cache_length)
            group.add_round(np.asarray(greedy), np.asarray(accepted), count=True)
        for index, answer in zip(chosen, group.answers, strict=True):
            answers[index] = answer
        done += len(chosen)
        on_done(done)
    return [answers[i] for i in range(len(prompts))]


def padded_width(prompts: Sequence[np.ndarray]) -> int:
    """The length of the longest prompt, rounded up to a multiple of WIDTH_STEP."""
    return -(-max(map(len, prompts)) // WIDTH_STEP) * WIDTH_STEP


class _Group:
    """Prompts that are decoded side by side, and their answers so far, on the host."""

    def __init__(self, prompts: list[np.ndarray], batch: int, max_new: int, ends: set[int]):
        self.prompts, self.batch, self.max_new, self.ends = prompts, batch, max_new, ends
        self.answers = [SpeculativeAnswer([], []) for _ in prompts]
        self.done = [False] * len(prompts)

    def padded(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(Tokens [B, width], lengths [B]); rows beyond the prompts repeat the first prompt."""
        filled = self.prompts + [self.prompts[0]] * (self.batch - len(self.prompts))
        tokens = np.zeros((self.batch, width), np.int32)
        for row, prompt in enumerate(filled):
            tokens[row, : len(prompt)] = prompt
        return tokens, np.array([len(p) for p in filled], np.int32)

    def active(self) -> bool:
        return not all(self.done)

    def add_round(self, greedy: np.ndarray, accepted: np.ndarray, *, count: bool) -> None:
        """Adds the committed tokens greedy[:, : accepted + 1]; `count` is false for the prefill, which is no round."""
        for row, answer in enumerate(self.answers):
            if self.done[row]:
                continue
            if count:
                answer.rounds.append(int(accepted[row]))
            for token in greedy[row, : accepted[row] + 1].tolist():
                answer.tokens.append(token)
                if token in self.ends or len(answer.tokens) == self.max_new:
                    self.done[row] = True
                    break


@functools.partial(jax.jit, static_argnames=("models", "draft_tokens", "cache_length"))
def _prefill(
    models: Models, weights: Any, tokens_BP: jax.Array, lengths_B: jax.Array, draft_tokens: int, cache_length: int
) -> tuple[DecodingState, jax.Array]:
    """Both models read the prompts -> (state, first token of each answer)."""
    rows, width = tokens_BP.shape
    positions = jnp.broadcast_to(jnp.arange(width), tokens_BP.shape)
    cache = models.target_cache(weights, rows, cache_length, draft_tokens + 1)
    greedy, _, aux, cache = models.verify(weights, cache, tokens_BP, positions, lengths_B)
    last = lengths_B - 1
    first = jnp.take_along_axis(greedy, last[:, None], axis=1)[:, 0]
    # Slot t reads the token after it; the prompt's last slot reads the answer's first token.
    next_tokens = shift_left(tokens_BP, 1).at[jnp.arange(rows), last].set(first)
    greedy_draft, hidden, draft_cache = models.draft_from_aux(
        weights, models.draft_cache(weights, rows, cache_length), aux, next_tokens, positions
    )
    return DecodingState(cache, draft_cache, lengths_B + 1, first, *_at(last, greedy_draft, hidden)), first


@functools.partial(jax.jit, static_argnames=("models", "draft_tokens", "cache_length"), donate_argnames=("state",))
def _round(models: Models, weights: Any, state: DecodingState, draft_tokens: int, cache_length: int):
    """Drafts K tokens and verifies them -> (state, the target's greedy tokens [B, K+1], accepted drafts [B])."""
    drafts, draft_cache = [state.first_draft_B], state.draft_cache
    hidden = state.hidden_BW[:, None]
    for j in range(1, draft_tokens):
        position = (state.length_B - 2 + j)[:, None]
        token, hidden, draft_cache = models.draft_from_own(weights, draft_cache, hidden, drafts[-1][:, None], position)
        drafts.append(token[:, 0])
    drafted_BK = jnp.stack(drafts, axis=1)
    positions = (state.length_B - 1)[:, None] + jnp.arange(draft_tokens + 1)
    tokens = jnp.concatenate([state.last_B[:, None], drafted_BK], axis=1)
    greedy, _, aux, target_cache = models.verify(weights, state.target_cache, tokens, positions, None)
    accepted = jnp.cumprod(drafted_BK == greedy[:, :-1], axis=1).sum(axis=1)
    greedy_draft, hidden, draft_cache = models.draft_from_aux(weights, draft_cache, aux, greedy, positions)
    last = jnp.take_along_axis(greedy, accepted[:, None], axis=1)[:, 0]
    # A row that has finished continues unused: its positions must stay within the caches.
    length = jnp.minimum(state.length_B + accepted + 1, cache_length - 2 * draft_tokens - 2)
    return (
        DecodingState(target_cache, draft_cache, length, last, *_at(accepted, greedy_draft, hidden)),
        greedy,
        accepted,
    )


def _at(index_B: jax.Array, tokens_BT: jax.Array, hidden_BTW: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = jnp.arange(index_B.shape[0])
    return tokens_BT[rows, index_B], hidden_BTW[rows, index_B]


def acceptance_counters(answers: Sequence[SpeculativeAnswer], draft_tokens: int) -> dict[str, Any]:
    """vLLM's counters over all rounds of all answers, and the acceptance length: 1 + accepted tokens per round."""
    rounds = np.array([r for answer in answers for r in answer.rounds], int)
    by_position = [(rounds > i).sum() / max(len(rounds), 1) for i in range(draft_tokens)]
    return {
        "drafts": len(rounds),
        "drafted_tokens": len(rounds) * draft_tokens,
        "accepted_tokens": int(rounds.sum()),
        "acceptance_by_position": [round(float(share), 4) for share in by_position],
        "acceptance_length": round(1 + float(rounds.sum()) / max(len(rounds), 1), 4),
    }
