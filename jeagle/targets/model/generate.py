"""Batched generation with a KV cache, greedy or sampled; a finished row is replaced by a waiting prompt."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jeagle.errors import UserError
from jeagle.runtime.mesh import replicated, row_parts
from jeagle.runtime.sampling import Sampling, sample_tokens, token_keys
from jeagle.targets.checkpoint.load import Target
from jeagle.targets.model.attention import cache_shardings
from jeagle.targets.model.finite import broken_target, check_text_finite

STEPS_BETWEEN_ADMISSIONS = 8
ADMITTED_AT_ONCE = 8
PROMPT_BUCKET = 64  # prompts are padded to a multiple of so many tokens

Stops = Callable[[np.ndarray], int | None]
# Maps an answer to the next prompt in its place, int32 [n], and that prompt's number; None if there is none.
FollowUp = Callable[["GeneratedAnswer"], tuple[np.ndarray, int] | None]


class GenerationState(NamedTuple):
    """State of B rows on the device: the cache is split over the mesh, everything else is replicated.

    Attributes:
      last_B: the token that each row reads next. position_B: its position.
      left_B: number of tokens that the row may still write; 0 = idle.
      written_BS: the tokens written so far, `count_B` of each row.
      number_B: number of the row's prompt, which its randomness follows from.
      finite_B: whether all logits that a token was chosen from so far were finite.
    """

    cache: Any
    last_B: jax.Array
    position_B: jax.Array
    left_B: jax.Array
    written_BS: jax.Array
    count_B: jax.Array
    number_B: jax.Array
    finite_B: jax.Array


class Prompts(NamedTuple):
    """R prompts of up to P tokens to prefill, with the rows that they go to; a row out of range marks padding."""

    tokens_RP: np.ndarray
    lengths_R: np.ndarray
    rows_R: np.ndarray
    limits_R: np.ndarray
    numbers_R: np.ndarray


def _constrained(state: GenerationState, mesh: Mesh | None) -> GenerationState:
    """The state with its shardings on the mesh, inside jit."""
    if mesh is None:
        return state
    shardings = GenerationState(cache_shardings(state.cache, mesh), *[replicated(mesh)] * (len(state) - 1))
    return jax.lax.with_sharding_constraint(state, shardings)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh", "batch", "length", "room"))
def idle_rows(graphdef: Any, params: Any, mesh: Mesh | None, batch: int, length: int, room: int) -> GenerationState:
    """The state of `batch` idle rows, with caches of `length` tokens and room for `room` written ones."""
    cache = nnx.merge(graphdef, params).empty_cache(batch, length, jnp.float32)
    zeros, written = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, room), jnp.int32)
    state = GenerationState(cache, zeros, zeros, zeros, written, zeros, zeros.astype(jnp.uint32), zeros == 0)
    return _constrained(state, mesh)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames=("state",))
def prefill(graphdef: Any, params: Any, state: GenerationState, prompts: Prompts, mesh: Any) -> GenerationState:
    """Reads prompts into their rows, except for the last token of each, which the next decoding step reads."""
    model = nnx.merge(graphdef, params)
    tokens_RP, last_R = prompts.tokens_RP, prompts.lengths_R - 1
    positions = jnp.broadcast_to(jnp.arange(tokens_RP.shape[1]), tokens_RP.shape)
    empty = model.empty_cache(*tokens_RP.shape, jnp.float32)
    _, _, fresh = model.extend(tokens_RP, positions, empty, (), last_R)

    def put(array: jax.Array, values: Any) -> jax.Array:
        return array.at[prompts.rows_R].set(values, mode="drop")

    filled = GenerationState(
        cache=model.admit(state.cache, fresh, prompts.rows_R),
        last_B=put(state.last_B, jnp.take_along_axis(tokens_RP, last_R[:, None], axis=1)[:, 0]),
        position_B=put(state.position_B, last_R),
        left_B=put(state.left_B, prompts.limits_R),
        written_BS=put(state.written_BS, 0),
        count_B=put(state.count_B, 0),
        number_B=put(state.number_B, prompts.numbers_R),
        finite_B=put(state.finite_B, True),
    )
    return _constrained(filled, mesh)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh", "sampling"), donate_argnames=("state",))
def decode_steps(
    graphdef: Any, params: Any, state: GenerationState, ends: jax.Array, key: jax.Array, mesh: Any, sampling: Sampling
) -> GenerationState:
    """Lets every busy row write STEPS_BETWEEN_ADMISSIONS tokens; it turns idle after one of `ends` or at its limit."""
    model = nnx.merge(graphdef, params)

    def one_step(state: GenerationState, _: None) -> tuple[GenerationState, None]:
        _, last, cache = model.extend(state.last_B[:, None], state.position_B[:, None], state.cache, ())
        keys_B = token_keys(key, state.number_B, state.count_B[:, None])[:, 0]
        logits_BV = model.logits(last[:, 0])
        token_B = sample_tokens(logits_BV, keys_B, sampling)
        busy_B = state.left_B > 0
        ended_B = (token_B[:, None] == ends).any(axis=1)
        slot_B = jnp.where(busy_B, state.count_B, state.written_BS.shape[1] - 1)  # idle rows write to a spare slot
        return GenerationState(
            cache=cache,
            last_B=jnp.where(busy_B, token_B, state.last_B),
            position_B=state.position_B + busy_B,
            left_B=jnp.where(ended_B, 0, jnp.maximum(state.left_B - 1, 0)),
            written_BS=state.written_BS.at[jnp.arange(token_B.shape[0]), slot_B].set(token_B),
            count_B=state.count_B + busy_B,
            number_B=state.number_B,
            finite_B=state.finite_B & (jnp.isfinite(logits_BV.sum(axis=-1)) | ~busy_B),
        ), None

    return _constrained(jax.lax.scan(one_step, state, None, length=STEPS_BETWEEN_ADMISSIONS)[0], mesh)


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
    """The target's answer to a prompt.

    Attributes:
      index: of the prompt.
      tokens: int32 ids, with the end token if there is one.
      finish_reason: "stop" after an end token or stop text, "length" at the limit.
    """

    index: int
    tokens: np.ndarray
    finish_reason: str


def generate(
    target: Target,
    prompts: Sequence[np.ndarray],
    *,
    end_token_ids: Sequence[int],
    max_new_tokens: int | Sequence[int],
    batch: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    stops: Stops | None = None,
    follow_up: FollowUp | None = None,
) -> Iterator[GeneratedAnswer]:
    """Generates answers to `prompts` (int32 [n] each), in the order in which they finish.

    An answer follows from its prompt, the seed and the prompt's number, and not from the batch or the order, except for
    rounding: XLA sums in an order that depends on shapes.

    Args:
      max_new_tokens: limit of every answer, or one limit for each.
      batch: number of rows that are decoded together; rounded up to a multiple of what the mesh splits rows into.
      sampling: None = greedy.
      numbers: a number below 2**32 for each prompt; None = their indices.
      stops: maps the tokens written so far to how many of them the answer keeps if it ends there, or to None.
      follow_up: called with every answer before it is yielded. A prompt that it returns is answered too, with the same
        index and the same limit, and before the prompts that wait. If it is longer than the caches, they grow by half
        at least, as soon as the rows that are busy have finished.

    Raises:
      UserError: for an empty prompt, a limit below 1, a prompt that exceeds the target's longest sequence together with
        its limit, or a target whose logits are not finite.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if any(len(p) == 0 for p in prompts):
        raise UserError("A prompt has no tokens: check the chat template and the file of prompts.")
    if any(limit < 1 for limit in limits):
        raise UserError(f"An answer of {min(limits)} new tokens cannot be written: the limit must be above 0.")
    for prompt, limit in zip(prompts, limits, strict=True):
        if len(prompt) + limit > target.spec.max_positions:
            raise UserError(
                f"A prompt of {len(prompt)} tokens and {limit} new ones exceed the target's longest sequence, "
                f"{target.spec.max_positions}: shorten the prompts or lower the number of new tokens."
            )
    numbers = range(len(prompts)) if numbers is None else numbers
    sampling = sampling or Sampling()
    generation = _Generation(target, prompts, limits, numbers, tuple(end_token_ids), batch, sampling, seed)
    yield from generation.run(stops, follow_up)


def in_buckets(length: int) -> int:
    """Returns the length to which prompts of so many tokens are padded."""
    return -(-length // PROMPT_BUCKET) * PROMPT_BUCKET


class _Generation:
    """The host's part: it decides which prompt sits in which row."""

    def __init__(self, target, prompts, limits, numbers, ends, batch, sampling, seed):
        self.prompts, self.limits, self.numbers = list(prompts), limits, list(numbers)
        self.longest = target.spec.max_positions
        self.model, self.mesh, self.sampling = (target.graphdef, target.state), target.mesh, sampling
        self.ends, self.key = jnp.array(ends, jnp.int32), jax.random.key(seed)
        parts = row_parts(self.mesh) if self.mesh is not None else 1
        self.batch, self.admitted = (-(-rows // parts) * parts for rows in (batch, ADMITTED_AT_ONCE))
        # The longest prompts come first, so that the last rows to finish are short ones.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.in_row: list[int | None] = [None] * self.batch
        self.bucket = in_buckets(max(map(len, prompts), default=0))
        self._empty()

    def _empty(self) -> None:
        """Makes caches for prompts of up to `bucket` tokens."""
        room = max(self.limits, default=0) + 1
        self.state: Any = None  # so that the old caches do not stay in memory
        self.state = idle_rows(*self.model, self.mesh, self.batch, self.bucket + room, room)

    def run(self, stops: Stops | None, follow_up: FollowUp | None) -> Iterator[GeneratedAnswer]:
        while self.waiting or any(i is not None for i in self.in_row):
            self._admit()
            self.state = decode_steps(*self.model, self.state, self.ends, self.key, self.mesh, self.sampling)
            for answer in self._finished(stops):
                if follow_up and (following := follow_up(answer)) is not None:
                    self.prompts[answer.index], self.numbers[answer.index] = following
                    self.waiting.appendleft(answer.index)
                yield answer

    def _admit(self) -> None:
        """Prefills waiting prompts into idle rows."""
        idle = [row for row, index in enumerate(self.in_row) if index is None]
        while idle and self.waiting:
            if not self._fits():
                if len(idle) < self.batch:
                    return
                longest = max(len(self.prompts[i]) for i in self.waiting)
                self.bucket = max(in_buckets(longest), in_buckets(min(3 * self.bucket // 2, self.longest)))
                self._empty()
            indices: list[int] = []
            while self._fits() and len(indices) < min(self.admitted, len(idle)):
                indices.append(self.waiting.popleft())
            tokens = np.zeros((self.admitted, in_buckets(max(len(self.prompts[i]) for i in indices))), np.int32)
            lengths, limits = np.ones(self.admitted, np.int32), np.zeros(self.admitted, np.int32)
            rows, numbers = np.full(self.admitted, self.batch, np.int32), np.zeros(self.admitted, np.uint32)
            for slot, index in enumerate(indices):
                prompt, row = self.prompts[index], idle.pop(0)
                self.in_row[row] = index
                tokens[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
                rows[slot], limits[slot], numbers[slot] = row, self.limits[index], self.numbers[index]
            prompts = Prompts(tokens, lengths, rows, limits, numbers)
            self.state = prefill(*self.model, self.state, prompts, self.mesh)

    def _check_finite(self, count: np.ndarray) -> None:
        """UserError where logits of a row were not finite; `count` as in the state."""
        for row in np.flatnonzero(~np.asarray(self.state.finite_B)):
            if (index := self.in_row[row]) is not None:
                written = np.asarray(self.state.written_BS)[row, : count[row]]
                check_text_finite(*self.model, np.concatenate([self.prompts[index], written]))
                raise broken_target("one of its layers")

    def _fits(self) -> bool:
        """Whether a prompt waits and the next one fits into the caches."""
        return bool(self.waiting) and len(self.prompts[self.waiting[0]]) <= self.bucket

    def _finished(self, stops: Stops | None) -> Iterator[GeneratedAnswer]:
        left, count = np.asarray(self.state.left_B), np.asarray(self.state.count_B)
        self._check_finite(count)
        busy = [row for row, index in enumerate(self.in_row) if index is not None and (stops or left[row] == 0)]
        if not busy:
            return
        written, ends = np.asarray(self.state.written_BS), np.asarray(self.ends)
        for row in busy:
            tokens = written[row, : count[row]].copy()
            length = stops(tokens) if stops else None
            if length is None and left[row] > 0:
                continue
            # A row that stops here stays busy on the device until the next prompt takes its place.
            index, self.in_row[row] = self.in_row[row], None
            assert index is not None
            stopped = length is not None or tokens[-1] in ends
            yield GeneratedAnswer(index, tokens[:length], "stop" if stopped else "length")
