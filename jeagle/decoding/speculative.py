"""Speculative decoding with a drafted chain or tree, greedy or sampled, many prompts side by side.

The committed tokens are x_0 .. x_{n-1}; the target has read all but the last one. A round drafts a tree below x_{n-1},
lets the target read all its nodes at once, and commits the path that the target's own choices follow, and one more
token of the target's. For a chain d_1 .. d_K:

    draft slot n-2   reads x_{n-1}, the target's features at n-2     -> d_1
    draft slot n-1.. reads d_j, its own last state                   -> d_{j+1}
    target           reads x_{n-1} d_1 .. d_K                        -> g_0 .. g_K
    d_1 .. d_a equal g_0 .. g_{a-1}: g_0 .. g_a are committed, and n grows by a + 1

The rule "target" lets the target choose the token after each node: at temperature 0 the most likely one, else one that
is sampled with randomness that follows from the prompt's number and the token's place. The text is therefore what plain
decoding gives with the same seed, whatever is drafted, and a drafted token x is accepted with the probability p(x) that
the target gives it. vLLM's V1 engine decides so, whose draft proposes its most likely token.

The rule "rejection", for chains, samples the drafted tokens from the draft's distribution q. Token x is accepted with
probability min(1, p(x) / q(x)); after a rejection a token is sampled from the positive part of p - q. The distribution
of the text is the target's.

Source: Leviathan et al. (arXiv 2211.17192); EAGLE-3 (arXiv 2503.01840) for the draft's inputs. Counters are vLLM's: the
first token, from the prompt's prefill, belongs to no round, and a round counts in full even if the answer ends in it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jeagle.align import shift_left
from jeagle.decoding.rejection import at_index, for_purpose, judge_by_rejection
from jeagle.decoding.tree import TreeShape, accept_path, choose_nodes, make_tree, tree_view
from jeagle.errors import UserError
from jeagle.runtime.sampling import GREEDY, Sampling, sample_tokens, token_keys

WIDTH_STEP = 32
"""Prompts are padded to a multiple of it, so that few shapes are compiled."""

NO_TOKEN = -1
"""What a draft proposes where its logits are not finite; no target accepts it."""

Rule = Literal["target", "rejection"]


class Models(NamedTuple):
    """The two models as functions of their weights; static under jit.

    Attributes:
      target_cache: (weights, rows, length, rollback) -> an empty cache that can be rolled back by `rollback` tokens.
      read: (weights, cache, tokens_BT, positions_BT, count_B or None, CacheView or None) -> (last_BTH, aux, cache): the
        target. The count is the number of real tokens in a row; aux are the aux hidden states.
      logits: (weights, last_BNH) -> float32 logits [B, N, V] of the target.
      move_slots: (weights, cache, from_BN, to_BN) -> the target's cache with slots copied.
      draft_cache: (weights, rows, length) -> an empty cache.
      fuse: (weights, aux) -> the first hidden states [B, T, W] of the draft.
      draft: (weights, cache, hidden_BTW, tokens_BT, positions_BT, CacheView or None) -> (what lm_head reads,
        hidden_BTW, cache).
      draft_logits: (weights, what lm_head reads) -> float32 logits [B, T, D] of the draft.
      draft_ids: (weights) -> the token id of each entry of the draft vocabulary, [D].
    """

    target_cache: Callable[..., Any]
    read: Callable[..., Any]
    logits: Callable[..., Any]
    move_slots: Callable[..., Any]
    draft_cache: Callable[..., Any]
    fuse: Callable[..., Any]
    draft: Callable[..., Any]
    draft_logits: Callable[..., Any]
    draft_ids: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How texts are decoded speculatively; static under jit.

    Attributes:
      shape: what is drafted before each verification.
      sampling: how the target chooses tokens.
      rule: how drafted tokens are judged; the two rules differ above temperature 0 only.

    Raises:
      UserError: for "rejection" with a tree.
    """

    shape: TreeShape
    sampling: Sampling = GREEDY
    rule: Rule = "target"

    def __post_init__(self) -> None:
        if self.rule == "rejection" and self.shape.top_k > 1:
            raise UserError("The rule rejection judges chains: give a top-k of 1, or the rule target.")


class DecodingState(NamedTuple):
    """The state of B sequences between rounds.

    Attributes:
      length_B: n, the number of committed tokens. last_B: x_{n-1}.
      written_B: how many of the committed tokens belong to the answer.
      numbers_B: number of each prompt, which its randomness follows from.
      logits_BD: the draft's logits for d_1. hidden_BW: the hidden state that gave them.
    """

    target_cache: Any
    draft_cache: Any
    length_B: jax.Array
    last_B: jax.Array
    written_B: jax.Array
    numbers_B: jax.Array
    logits_BD: jax.Array
    hidden_BW: jax.Array


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
    decoding: Decoding,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    batch: int,
    width: int = 0,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[SpeculativeAnswer]:
    """Decodes all prompts speculatively; answers in the prompts' order.

    Args:
      end_token_ids: an answer ends with the first of them, or after `max_new_tokens`.
      batch: prompts that are decoded side by side.
      width: prompts are padded to the longest one or to `width`, whichever is larger; calls with one width share their
        compiled programs.
      seed: of the sampling. A prompt's number is its index.
      on_done: called with the number of prompts that are done.
    """
    width = max(padded_width(prompts), width)
    cache_length = width + max_new_tokens + 2 * decoding.shape.room
    answers, done = [SpeculativeAnswer([], []) for _ in prompts], 0
    key = jax.random.key(seed)

    def commit(tokens: np.ndarray, accepted: np.ndarray) -> None:
        """Adds tokens[:, : accepted + 1] to the answers of the running rows; rows that end stop running."""
        for row, answer in list(running.items()):
            for token in tokens[row, : accepted[row] + 1].tolist():
                answer.tokens.append(token)
                if token in end_token_ids or len(answer.tokens) == max_new_tokens:
                    del running[row]
                    break

    for chosen, tokens_BP, lengths_B in grouped(prompts, batch, width):
        running = {row: answers[i] for row, i in enumerate(chosen)}
        numbers_B = jnp.array([*chosen, *[chosen[0]] * (batch - len(chosen))], jnp.uint32)
        state = _prefill(models, weights, tokens_BP, lengths_B, numbers_B, key, decoding, cache_length)
        commit(np.asarray(state.last_B)[:, None], np.zeros(batch, int))  # the prefill is no round
        while running:
            state, tokens, accepted = _round(models, weights, state, key, decoding, cache_length)
            accepted = np.asarray(accepted)
            for row, answer in running.items():
                answer.rounds.append(int(accepted[row]))
            commit(np.asarray(tokens), accepted)
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


def read_prompts(
    models: Models, weights: Any, tokens_BP: jax.Array, lengths_B: jax.Array, length: int, rollback: int
) -> tuple[Float[Array, "B V"], Any, Any, Int[Array, "B P"]]:
    """The target reads prompts -> (logits after each, aux hidden states, its cache of `length` slots, positions)."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BP.shape[1]), tokens_BP.shape)
    cache = models.target_cache(weights, tokens_BP.shape[0], length, rollback)
    last, aux, cache = models.read(weights, cache, tokens_BP, positions, lengths_B, None)
    return models.logits(weights, at_index(lengths_B - 1, last)[:, None])[:, 0], aux, cache, positions


@functools.partial(jax.jit, static_argnames=("models", "decoding", "cache_length"))
def _prefill(models, weights, tokens_BP, lengths_B, numbers_B, key, decoding: Decoding, cache_length: int):
    """Both models read the prompts -> the state, whose last tokens are the first tokens of the answers."""
    rows, rollback = jnp.arange(tokens_BP.shape[0]), decoding.shape.steps + 1
    logits, aux, cache, positions = read_prompts(models, weights, tokens_BP, lengths_B, cache_length, rollback)
    keys_B = token_keys(key, numbers_B, jnp.zeros_like(lengths_B)[:, None])[:, 0]
    first_B, last = sample_tokens(logits, keys_B, decoding.sampling), lengths_B - 1
    # Slot t reads the token after it; the prompt's last slot reads the answer's first token.
    next_tokens = shift_left(tokens_BP, 1).at[rows, last].set(first_B)
    draft_cache = models.draft_cache(weights, len(rows), cache_length)
    for_head, hidden, draft_cache = models.draft(
        weights, draft_cache, models.fuse(weights, aux), next_tokens, positions, None
    )
    logits_BD = models.draft_logits(weights, at_index(last, for_head)[:, None])[:, 0]
    written_B = jnp.ones_like(lengths_B)
    return DecodingState(
        cache, draft_cache, lengths_B + 1, first_B, written_B, numbers_B, logits_BD, at_index(last, hidden)
    )


@functools.partial(jax.jit, static_argnames=("models", "decoding", "cache_length"), donate_argnames=("state",))
def _round(models, weights, state: DecodingState, key, decoding: Decoding, cache_length: int):
    """Drafts and verifies -> (state, committed tokens [B, steps + 1], number of accepted drafted tokens [B])."""
    shape, first_B = decoding.shape, state.length_B - 1  # the slot of x_{n-1} in the target's cache
    sampled_draft = decoding.rule == "rejection" and decoding.sampling.temperature > 0
    if shape.top_k == 1:
        tree, logits_BKD, draft_cache = _draft_chain(models, weights, state, key, decoding, sampled_draft)
        view = None
    else:
        tree, draft_cache = _draft_tree(models, weights, state, shape, cache_length)
        slots = first_B[:, None] + jnp.arange(shape.verify)
        view = tree_view(first_B, slots, tree.depth_BN, tree.ancestors_BNN, cache_length)
    positions = first_B[:, None] + tree.depth_BN
    last, aux, target_cache = models.read(weights, state.target_cache, tree.tokens_BN, positions, None, view)
    logits_BNV = models.logits(weights, last)
    keys_BN = token_keys(key, state.numbers_B, state.written_B[:, None] + tree.depth_BN)
    if sampled_draft:
        ids_D = models.draft_ids(weights)
        accepted, committed = judge_by_rejection(tree, logits_BNV, logits_BKD, ids_D, keys_BN, decoding.sampling)
    else:
        flat = (logits_BNV.reshape(-1, logits_BNV.shape[-1]), keys_BN.reshape(-1), decoding.sampling)
        chosen_BN = sample_tokens(*flat).reshape(keys_BN.shape)
        accepted = accept_path(tree, chosen_BN, shape.steps)
        committed = jnp.take_along_axis(chosen_BN, accepted.path_BS, axis=1)
    ahead = jnp.arange(shape.steps + 1)
    if shape.top_k > 1:
        path = first_B[:, None] + accepted.path_BS
        target_cache = models.move_slots(weights, target_cache, path, first_B[:, None] + ahead)
        aux = jnp.take_along_axis(aux, accepted.path_BS[:, :, None, None], axis=1)
    for_head, hidden, draft_cache = models.draft(
        weights, draft_cache, models.fuse(weights, aux), committed, first_B[:, None] + ahead, None
    )
    count_B = accepted.count_B
    state = DecodingState(
        target_cache,
        draft_cache,
        # A row that has finished continues unused: its slots must stay within the caches.
        jnp.minimum(state.length_B + count_B + 1, cache_length - shape.room),
        at_index(count_B, committed),
        state.written_B + count_B + 1,
        state.numbers_B,
        models.draft_logits(weights, at_index(count_B, for_head)[:, None])[:, 0],
        at_index(count_B, hidden),
    )
    return state, committed, count_B


def _draft_chain(models, weights, state: DecodingState, key, decoding: Decoding, sampled: bool):
    """-> (the chain as a tree, the draft's logits [B, K, D], its cache)."""
    steps, ids_D = decoding.shape.steps, models.draft_ids(weights)

    def choose(logits_BD: jax.Array, step: jax.Array) -> jax.Array:
        if sampled:
            keys_B = for_purpose(token_keys(key, state.numbers_B, (state.written_B + step)[:, None]), "draft")[:, 0]
            entry_B = sample_tokens(logits_BD, keys_B, decoding.sampling)
        else:
            entry_B = jnp.argmax(logits_BD, axis=-1)
        return jnp.where(jnp.isfinite(logits_BD.max(axis=-1)), ids_D[entry_B], NO_TOKEN)

    def one(carry: Any, step: jax.Array):
        token, hidden, cache = carry
        positions = (state.length_B - 2 + step)[:, None]
        for_head, hidden, cache = models.draft(weights, cache, hidden, token[:, None], positions, None)
        logits = models.draft_logits(weights, for_head)[:, 0]
        token = choose(logits, step)
        return (token, hidden, cache), (token, logits)

    first_B = choose(state.logits_BD, jnp.zeros((), jnp.int32))
    carry = (first_B, state.hidden_BW[:, None], state.draft_cache)
    (_, _, cache), (tokens, logits) = jax.lax.scan(one, carry, jnp.arange(1, steps))
    tokens_BN = jnp.stack([state.last_B, first_B, *tokens], axis=1)
    logits_BKD = jnp.stack([state.logits_BD, *logits], axis=1) if sampled else None
    parents = jnp.maximum(jnp.arange(steps + 1) - 1, 0)
    return make_tree(tokens_BN, jnp.broadcast_to(parents, tokens_BN.shape), steps), logits_BKD, cache


def _draft_tree(models, weights, state: DecodingState, shape: TreeShape, cache_length: int):
    """-> (the tree, the draft's cache, in which the k nodes of step d are stored from slot n-1 + (d-1) k on)."""
    k, ids_D = shape.top_k, models.draft_ids(weights)
    first_B, batch = state.length_B - 1, len(state.last_B)
    depth_BM = jnp.broadcast_to(jnp.arange(shape.expanded) // k, (batch, shape.expanded))

    def children(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores, entries = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), k)
        finite = jnp.isfinite(scores)
        return jnp.where(finite, scores, -jnp.inf), jnp.where(finite, ids_D[entries], NO_TOKEN)

    def expand(carry: Any, step: jax.Array):
        tokens_Bk, scores_Bk, numbers_Bk, hidden_BkW, above_BkM, cache = carry
        stored = step * k + jnp.arange(k)
        above_BkM |= stored[:, None] == jnp.arange(shape.expanded)
        slots = first_B[:, None] + stored
        view = tree_view(first_B, slots, depth_BM, above_BkM, cache_length)
        positions = jnp.broadcast_to(first_B[:, None] + step, slots.shape)
        for_head, hidden_BkW, cache = models.draft(weights, cache, hidden_BkW, tokens_Bk, positions, view)
        scores, tokens = children(models.draft_logits(weights, for_head))
        scores_BC, tokens_BC = (scores_Bk[:, :, None] + scores).reshape(batch, -1), tokens.reshape(batch, -1)
        best, pick = jax.lax.top_k(scores_BC, k)
        parent = pick // k
        carry = (
            jnp.take_along_axis(tokens_BC, pick, axis=1),
            best,
            k + step * k * k + pick,
            jnp.take_along_axis(hidden_BkW, parent[:, :, None], axis=1),
            jnp.take_along_axis(above_BkM, parent[:, :, None], axis=1),
            cache,
        )
        return carry, (tokens_BC, scores_BC, jnp.repeat(numbers_Bk, k, axis=1))

    scores_Bk, tokens_Bk = children(state.logits_BD)
    numbers_Bk = jnp.broadcast_to(jnp.arange(k), tokens_Bk.shape)
    hidden_BkW = jnp.repeat(state.hidden_BW[:, None], k, axis=1)
    above_BkM = jnp.zeros((batch, k, shape.expanded), bool)
    carry = (tokens_Bk, scores_Bk, numbers_Bk, hidden_BkW, above_BkM, state.draft_cache)
    (*_, cache), later = jax.lax.scan(expand, carry, jnp.arange(shape.steps - 1))
    from_root = jnp.full(tokens_Bk.shape, shape.candidates)
    candidates = (
        jnp.concatenate([first, jnp.moveaxis(rest, 0, 1).reshape(batch, -1)], axis=1)
        for first, rest in zip((tokens_Bk, scores_Bk, from_root), later, strict=True)
    )
    tokens_BC, scores_BC, parents_BC = candidates
    return choose_nodes(state.last_B, tokens_BC, parents_BC, scores_BC, shape), cache


def acceptance_counters(answers: Sequence[SpeculativeAnswer], shape: TreeShape) -> dict[str, Any]:
    """vLLM's counters over all rounds of all answers, and the acceptance length: 1 + accepted tokens per round."""
    rounds = np.array([r for answer in answers for r in answer.rounds], int)
    by_position = [(rounds > i).sum() / max(len(rounds), 1) for i in range(shape.steps)]
    return {
        "drafts": len(rounds),
        "drafted_tokens": len(rounds) * (shape.verify - 1),
        "accepted_tokens": int(rounds.sum()),
        "acceptance_by_position": [round(float(share), 4) for share in by_position],
        "acceptance_length": round(1 + float(rounds.sum()) / max(len(rounds), 1), 4),
    }
