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

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
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
    width = max(padded_width(prompts), width)
    cache_length = width + max_new_tokens + 2 * draft_tokens + 2
    answers, done = [SpeculativeAnswer([], []) for _ in prompts], 0

    def commit(greedy: np.ndarray, accepted: np.ndarray) -> None:
        """Adds greedy[:, : accepted + 1] to the answers of the running rows; rows that end stop running."""
        for row, answer in list(running.items()):
            for token in greedy[row, : accepted[row] + 1].tolist():
                answer.tokens.append(token)
                if token in end_token_ids or len(answer.tokens) == max_new_tokens:
                    del running[row]
                    break

    for chosen, tokens_BP, lengths_B in grouped(prompts, batch, width):
        running = {row: answers[i] for row, i in enumerate(chosen)}
        state, first = _prefill(models, weights, tokens_BP, lengths_B, draft_tokens, cache_length)
        commit(np.asarray(first)[:, None], np.zeros(batch, int))  # the prefill is no round
        while running:
            state, greedy, accepted = _round(models, weights, state, draft_tokens, cache_length)
            accepted = np.asarray(accepted)
            for row, answer in running.items():
                answer.rounds.append(int(accepted[row]))
            commit(np.asarray(greedy), accepted)
        done += len(chosen)
        on_done(done)
    return answers


def padded_width(prompts: Sequence[np.ndarray]) -> int:
    """The length of the longest prompt, rounded up to a multiple of WIDTH_STEP."""
    return -(-max(map(len, prompts)) // WIDTH_STEP) * WIDTH_STEP


def grouped(
    prompts: Sequence[np.ndarray], batch: int, width: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Groups of `batch` prompts, short ones first: (indices, tokens int32 [B, width], lengths int32 [B]).

    Where the last group has fewer prompts, its first one fills the remaining rows.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        filled = [prompts[i] for i in chosen] + [prompts[chosen[0]]] * (batch - len(chosen))
        tokens_BP = np.zeros((batch, width), np.int32)
        for row, prompt in enumerate(filled):
            tokens_BP[row, : len(prompt)] = prompt
        yield chosen, tokens_BP, np.array([len(prompt) for prompt in filled], np.int32)


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
    state = DecodingState(target_cache, draft_cache, length, last, *_at(accepted, greedy_draft, hidden))
    return state, greedy, accepted


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
