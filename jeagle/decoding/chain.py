"""Speculative decoding with a chain of drafted tokens at temperature 0, many prompts side by side.

Committed tokens x_0 .. x_{n-1}; the target has read all but the last. A round drafts d_1 .. d_K, lets the target read
x_{n-1}, d_1 .. d_K at once, takes the drafts that equal its own greedy choices and one more token of its own:

    draft slot n-2   reads x_{n-1}, the target's features at n-2     -> d_1
    draft slot n-1.. reads d_j, its own last state                   -> d_{j+1}
    target           reads x_{n-1} d_1 .. d_K                        -> g_0 .. g_K
    a drafts equal   g_0 .. g_{a-1}; committed: g_0 .. g_a           n grows by a + 1

Source: Leviathan et al. (arXiv 2211.17192) at temperature 0; EAGLE-3 (arXiv 2503.01840) for the draft's inputs.
Counters are vLLM's: the token of the prompt's own forward belongs to no draft, and a round counts in full also where
the answer is cut inside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTH_STEP = 32  # prompts are padded to a multiple, so that few shapes are compiled


class Models(NamedTuple):
    """The two models as functions of their weights, static under jit.

    Attributes:
      target_cache: (weights, rows, length, rollback) -> an empty cache whose rows can go back by `rollback` tokens.
      draft_cache: (weights, rows, length) -> an empty cache.
      verify: (weights, cache, tokens_BT, positions_BT, count_B or None) -> (greedy_BT, gap_BT, taps, cache); the gap is
        between the best two logits, the count says how many tokens of a row are real.
      read: (weights, cache, taps, tokens_BT, positions_BT) -> (choice_BT, state_BTW, cache): the draft on the target's
        features.
      go_on: (weights, cache, state_B1W, tokens_B1, positions_B1) -> (choice_B1, state_B1W, cache): on its own state.
    """

    target_cache: Callable[..., Any]
    draft_cache: Callable[..., Any]
    verify: Callable[..., Any]
    read: Callable[..., Any]
    go_on: Callable[..., Any]


class Rows(NamedTuple):
    """Where each of B sequences stands."""

    target_cache: Any
    draft_cache: Any
    length_B: jax.Array  # n: committed tokens
    last_B: jax.Array  # x_{n-1}
    choice_B: jax.Array  # d_1
    state_BW: jax.Array  # the draft's state behind it


@dataclasses.dataclass
class Measured:
    """What decoding a prompt gave.

    Attributes:
      tokens: the answer, the end token included.
      rounds: for each verification, how many drafts were accepted.
    """

    tokens: list[int]
    rounds: list[int]


def decode(
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
) -> list[Measured]:
    """Decodes all prompts speculatively; results in the prompts' order.

    Prompts are padded to the longest or to `width`, if that is more: calls of one width share their programs.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    width = max(padded_width(prompts), width)
    room = width + max_new_tokens + 2 * draft_tokens + 2
    results: dict[int, Measured] = {}
    done = 0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        group = _Group([prompts[i] for i in chosen], batch, max_new_tokens, set(end_token_ids))
        rows, first = _start(models, weights, *group.padded(width), draft_tokens, room)
        group.take(np.asarray(first)[:, None], np.zeros(batch, int), count=False)
        while group.active():
            rows, greedy, accepted = _round(models, weights, rows, draft_tokens, room)
            group.take(np.asarray(greedy), np.asarray(accepted), count=True)
        for index, measured in zip(chosen, group.results, strict=True):
            results[index] = measured
        done += len(chosen)
        on_done(done)
    return [results[i] for i in range(len(prompts))]


def padded_width(prompts: Sequence[np.ndarray]) -> int:
    """One width for all prompts, so that one program serves them."""
    return -(-max(map(len, prompts)) // WIDTH_STEP) * WIDTH_STEP


class _Group:
    """Host side of prompts that are decoded side by side."""

    def __init__(self, prompts: list[np.ndarray], batch: int, max_new: int, ends: set[int]):
        self.prompts, self.batch, self.max_new, self.ends = prompts, batch, max_new, ends
        self.results = [Measured([], []) for _ in prompts]
        self.done = [False] * len(prompts)

    def padded(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens [B, width] and lengths [B]; rows beyond the prompts repeat the first one."""
        filled = self.prompts + [self.prompts[0]] * (self.batch - len(self.prompts))
        tokens = np.zeros((self.batch, width), np.int32)
        for row, prompt in enumerate(filled):
            tokens[row, : len(prompt)] = prompt
        return tokens, np.array([len(p) for p in filled], np.int32)

    def active(self) -> bool:
        return not all(self.done)

    def take(self, greedy: np.ndarray, accepted: np.ndarray, *, count: bool) -> None:
        for row, result in enumerate(self.results):
            if self.done[row]:
                continue
            if count:
                result.rounds.append(int(accepted[row]))
            for token in greedy[row, : accepted[row] + 1].tolist():
                result.tokens.append(token)
                if token in self.ends or len(result.tokens) == self.max_new:
                    self.done[row] = True
                    break


@functools.partial(jax.jit, static_argnames=("models", "draft_tokens", "room"))
def _start(
    models: Models, weights: Any, tokens_BP: jax.Array, lengths_B: jax.Array, draft_tokens: int, room: int
) -> tuple[Rows, jax.Array]:
    """Reads the prompts with both models -> (rows, first token of each answer)."""
    rows, width = tokens_BP.shape
    positions = jnp.broadcast_to(jnp.arange(width), tokens_BP.shape)
    cache = models.target_cache(weights, rows, room, draft_tokens + 1)
    greedy, _, aux, cache = models.verify(weights, cache, tokens_BP, positions, lengths_B)
    last = lengths_B - 1
    first = jnp.take_along_axis(greedy, last[:, None], axis=1)[:, 0]
    # Slot t reads the token after it; the prompt's last slot reads the answer's first token.
    following = jnp.concatenate([tokens_BP[:, 1:], tokens_BP[:, :1]], axis=1)
    following = following.at[jnp.arange(rows), last].set(first)
    choice, state, draft_cache = models.read(
        weights, models.draft_cache(weights, rows, room), aux, following, positions
    )
    return Rows(cache, draft_cache, lengths_B + 1, first, *_at(last, choice, state)), first


@functools.partial(jax.jit, static_argnames=("models", "draft_tokens", "room"), donate_argnames=("rows",))
def _round(models: Models, weights: Any, rows: Rows, draft_tokens: int, room: int):
    """One draft and its verification -> (rows, greedy [B, K+1], accepted [B])."""
    drafts, draft_cache = [rows.choice_B], rows.draft_cache
    state = rows.state_BW[:, None]
    for j in range(1, draft_tokens):
        position = (rows.length_B - 2 + j)[:, None]
        choice, state, draft_cache = models.go_on(weights, draft_cache, state, drafts[-1][:, None], position)
        drafts.append(choice[:, 0])
    drafted_BK = jnp.stack(drafts, axis=1)
    positions = (rows.length_B - 1)[:, None] + jnp.arange(draft_tokens + 1)
    tokens = jnp.concatenate([rows.last_B[:, None], drafted_BK], axis=1)
    greedy, _, aux, target_cache = models.verify(weights, rows.target_cache, tokens, positions, None)
    accepted = jnp.cumprod(drafted_BK == greedy[:, :-1], axis=1).sum(axis=1)
    choice, state, draft_cache = models.read(weights, draft_cache, aux, greedy, positions)
    last = jnp.take_along_axis(greedy, accepted[:, None], axis=1)[:, 0]
    # A row that has finished goes on idly: its place must stay within the caches.
    length = jnp.minimum(rows.length_B + accepted + 1, room - 2 * draft_tokens - 2)
    return Rows(target_cache, draft_cache, length, last, *_at(accepted, choice, state)), greedy, accepted


def _at(place_B: jax.Array, choice_BT: jax.Array, state_BTW: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = jnp.arange(place_B.shape[0])
    return choice_BT[rows, place_B], state_BTW[rows, place_B]


def counters(measured: Sequence[Measured], draft_tokens: int) -> dict[str, Any]:
    """vLLM's counters over all rounds of all prompts, and the acceptance length 1 + accepted / drafts."""
    rounds = np.array([r for m in measured for r in m.rounds], int)
    by_position = [(rounds > i).sum() / max(len(rounds), 1) for i in range(draft_tokens)]
    return {
        "drafts": len(rounds),
        "drafted_tokens": len(rounds) * draft_tokens,
        "accepted_tokens": int(rounds.sum()),
        "acceptance_by_position": [round(float(share), 4) for share in by_position],
        "acceptance_length": round(1 + float(rounds.sum()) / max(len(rounds), 1), 4),
    }
