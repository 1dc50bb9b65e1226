"""Batched greedy generation with a KV cache; a finished row is replaced by a waiting prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.errors import UserError
from jeagle.targets.load import Target

STEPS_BETWEEN_ADMISSIONS = 8
ADMITTED_AT_ONCE = 8
PROMPT_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the target said: `index` of the prompt, ids with the end token if there is one, and why it ended."""

    index: int
    tokens: np.ndarray
    finish_reason: str  # "stop" or "length"


class _Rows(NamedTuple):
    """The state of B rows on the device."""

    cache: Any
    last_B: jax.Array  # the token that each row has to read next
    position_B: jax.Array  # where it stands
    left_B: jax.Array  # tokens that the row may still write; 0 = idle
    written_BS: jax.Array
    count_B: jax.Array


def generate(
    target: Target,
    prompts: Sequence[np.ndarray],
    *,
    end_token_ids: Sequence[int],
    max_new_tokens: int,
    batch: int,
) -> Iterator[Answer]:
    """Greedy answers to `prompts` (int32 [n] each), in the order in which they finish.

    Raises:
      UserError: for an empty prompt, or one that leaves no room within the target's longest sequence.
    """
    longest = max((len(p) for p in prompts), default=0)
    if any(len(p) == 0 for p in prompts):
        raise UserError("A prompt has no tokens: check the chat template and the file of prompts.")
    if longest + max_new_tokens > target.spec.max_positions:
        raise UserError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the target's longest sequence, "
            f"{target.spec.max_positions}: shorten the prompts or lower the number of new tokens."
        )
    yield from _Generation(target, prompts, tuple(end_token_ids), max_new_tokens, batch, longest).run()


class _Generation:
    """Host side: which prompt sits in which row."""

    def __init__(self, target, prompts, ends, max_new_tokens, batch, longest):
        self.target, self.prompts, self.ends = target, prompts, jnp.array(ends, jnp.int32)
        self.max_new, self.batch = max_new_tokens, batch
        # Longest prompts first: what finishes last is then short.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.in_row: list[int | None] = [None] * batch
        self.bucket = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
        model = target.model()
        self.rows = _Rows(
            cache=model.empty_cache(batch, self.bucket + max_new_tokens + 1, jnp.float32),
            last_B=jnp.zeros(batch, jnp.int32),
            position_B=jnp.zeros(batch, jnp.int32),
            left_B=jnp.zeros(batch, jnp.int32),
            written_BS=jnp.zeros((batch, max_new_tokens + 1), jnp.int32),
            count_B=jnp.zeros(batch, jnp.int32),
        )

    def run(self) -> Iterator[Answer]:
        while self.waiting or any(i is not None for i in self.in_row):
            self._admit()
            self.rows = _decode(self.target.graphdef, self.target.state, self.rows, self.ends, STEPS_BETWEEN_ADMISSIONS)
            yield from self._finished()

    def _admit(self) -> None:
        idle = [row for row, index in enumerate(self.in_row) if index is None]
        while idle and self.waiting:
            rows = [idle.pop(0) for _ in range(min(ADMITTED_AT_ONCE, len(idle), len(self.waiting)))]
            tokens = np.zeros((ADMITTED_AT_ONCE, self.bucket), np.int32)
            lengths = np.ones(ADMITTED_AT_ONCE, np.int32)
            places = np.full(ADMITTED_AT_ONCE, self.batch, np.int32)  # out of range: dropped
            for slot, row in enumerate(rows):
                index = self.waiting.popleft()
                prompt = self.prompts[index]
                tokens[slot, : len(prompt)], lengths[slot], places[slot] = prompt, len(prompt), row
                self.in_row[row] = index
            # Prompts wait in order of length, so the first of the batch sets the bucket.
            width = -(-int(lengths.max()) // PROMPT_BUCKET) * PROMPT_BUCKET
            self.rows = _prefill(
                self.target.graphdef, self.target.state, self.rows, tokens[:, :width], lengths, places, self.max_new
            )

    def _finished(self) -> Iterator[Answer]:
        left, count = np.asarray(self.rows.left_B), np.asarray(self.rows.count_B)
        done = [row for row, index in enumerate(self.in_row) if index is not None and left[row] == 0]
        if not done:
            return
        written = np.asarray(self.rows.written_BS)
        ends = np.asarray(self.ends)
        for row in done:
            index, self.in_row[row] = self.in_row[row], None
            tokens = written[row, : count[row]].copy()
            if index is not None:
                yield Answer(index, tokens, "stop" if tokens[-1] in ends else "length")


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new"), donate_argnames=("rows",))
def _prefill(
    graphdef: Any,
    state: Any,
    rows: _Rows,
    tokens_RP: jax.Array,
    lengths_R: jax.Array,
    places_R: jax.Array,
    max_new: int,
) -> _Rows:
    """Reads prompts into the rows `places` (those out of range are dropped); the last prompt token is left to read."""
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens_RP.shape[1]), tokens_RP.shape)
    empty = model.empty_cache(*tokens_RP.shape, jnp.float32)
    _, _, fresh = model.extend(tokens_RP, positions, empty, (), lengths_R - 1)
    cache = model.admit(rows.cache, fresh, places_R)
    ends = jnp.take_along_axis(tokens_RP, lengths_R[:, None] - 1, axis=1)[:, 0]

    def put(array: jax.Array, values: Any) -> jax.Array:
        return array.at[places_R].set(values, mode="drop")

    return _Rows(
        cache=cache,
        last_B=put(rows.last_B, ends),
        position_B=put(rows.position_B, lengths_R - 1),
        left_B=put(rows.left_B, max_new),
        written_BS=put(rows.written_BS, 0),
        count_B=put(rows.count_B, 0),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"), donate_argnames=("rows",))
def _decode(graphdef: Any, state: Any, rows: _Rows, ends: jax.Array, steps: int) -> _Rows:
    """Every busy row writes up to `steps` tokens."""
    model = nnx.merge(graphdef, state)

    def one(rows: _Rows, _: None) -> tuple[_Rows, None]:
        _, last, cache = model.extend(rows.last_B[:, None], rows.position_B[:, None], rows.cache, ())
        token_B = jnp.argmax(model.logits(last[:, 0]), axis=-1).astype(jnp.int32)
        busy_B = rows.left_B > 0
        ended_B = (token_B[:, None] == ends).any(axis=1)
        everyone = jnp.arange(token_B.shape[0])
        place_B = jnp.where(busy_B, rows.count_B, rows.written_BS.shape[1] - 1)
        return _Rows(
            cache=cache,
            last_B=jnp.where(busy_B, token_B, rows.last_B),
            position_B=rows.position_B + busy_B,
            left_B=jnp.where(ended_B, 0, jnp.maximum(rows.left_B - 1, 0)),
            written_BS=rows.written_BS.at[everyone, place_B].set(token_B),
            count_B=rows.count_B + busy_B,
        ), None

    return jax.lax.scan(one, rows, None, length=steps)[0]
