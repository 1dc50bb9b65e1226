"""Batched generation with a KV cache; a finished row is replaced by a waiting prompt."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.errors import UserError
from jeagle.runtime.mesh import row_parts
from jeagle.targets.checkpoint.load import Target
from jeagle.targets.model.generation_rows import Prompts, decode, empty_rows, prefill
from jeagle.targets.model.sampling import Sampling

STEPS_BETWEEN_ADMISSIONS = 8
ADMITTED_AT_ONCE = 8
PROMPT_BUCKET = 64

Stops = Callable[[np.ndarray], int | None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the target said: `index` of the prompt, ids with the end token if there is one, and why it ended."""

    index: int
    tokens: np.ndarray
    finish_reason: str  # "stop" or "length"


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
) -> Iterator[Answer]:
    """Answers to `prompts` (int32 [n] each), in the order in which they finish.

    An answer follows from its prompt, the seed and the prompt's number: not from the batch, its neighbours or the
    order. What remains of them is rounding, since XLA sums in an order that depends on shapes.

    Args:
      max_new_tokens: of every answer, or of each.
      batch: rows side by side; rounded up to what the mesh splits rows into.
      sampling: greedy where None.
      numbers: of the prompts, below 2**32; their indices where None.
      stops: tokens written so far -> how many of them the answer keeps if it ends there, else None.

    Raises:
      UserError: for an empty prompt, a limit below 1, or what leaves no room within the target's longest sequence.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(target, prompts, limits)
    numbers = range(len(prompts)) if numbers is None else numbers
    how = sampling or Sampling()
    yield from _Generation(target, prompts, limits, numbers, tuple(end_token_ids), batch, how, seed).run(stops)


def _check(target: Target, prompts: Sequence[np.ndarray], limits: list[int]) -> None:
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


class _Generation:
    """Host side: which prompt sits in which row."""

    def __init__(self, target, prompts, limits, numbers, ends, batch, sampling, seed):
        self.target, self.prompts, self.limits, self.numbers = target, prompts, limits, numbers
        self.mesh, self.sampling = target.mesh, sampling
        self.ends, self.key = jnp.array(ends, jnp.int32), jax.random.key(seed)
        parts = row_parts(self.mesh) if self.mesh is not None else 1
        self.batch, self.admitted = (-(-rows // parts) * parts for rows in (batch, ADMITTED_AT_ONCE))
        # Longest prompts first: what finishes last is then short.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.in_row: list[int | None] = [None] * self.batch
        bucket = -(-max(map(len, prompts), default=0) // PROMPT_BUCKET) * PROMPT_BUCKET
        room = max(limits, default=0) + 1
        self.rows = empty_rows(target.graphdef, target.state, self.mesh, self.batch, bucket + room, room)

    def run(self, stops: Stops | None) -> Iterator[Answer]:
        while self.waiting or any(i is not None for i in self.in_row):
            self._admit()
            self.rows = decode(
                self.target.graphdef,
                self.target.state,
                self.rows,
                self.ends,
                self.key,
                mesh=self.mesh,
                sampling=self.sampling,
                steps=STEPS_BETWEEN_ADMISSIONS,
            )
            yield from self._finished(stops)

    def _admit(self) -> None:
        idle = [row for row, index in enumerate(self.in_row) if index is None]
        while idle and self.waiting:
            rows = [idle.pop(0) for _ in range(min(self.admitted, len(idle), len(self.waiting)))]
            indices = [self.waiting.popleft() for _ in rows]
            for row, index in zip(rows, indices, strict=True):
                self.in_row[row] = index
            self.rows = prefill(
                self.target.graphdef, self.target.state, self.rows, self._padded(rows, indices), mesh=self.mesh
            )

    def _padded(self, rows: list[int], indices: list[int]) -> Prompts:
        longest = max(len(self.prompts[i]) for i in indices)
        tokens = np.zeros((self.admitted, -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET), np.int32)
        lengths, limits = np.ones(self.admitted, np.int32), np.zeros(self.admitted, np.int32)
        places, numbers = np.full(self.admitted, self.batch, np.int32), np.zeros(self.admitted, np.uint32)
        for slot, (row, index) in enumerate(zip(rows, indices, strict=True)):
            prompt = self.prompts[index]
            tokens[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
            places[slot], limits[slot], numbers[slot] = row, self.limits[index], self.numbers[index]
        return Prompts(tokens, lengths, places, limits, numbers)

    def _finished(self, stops: Stops | None) -> Iterator[Answer]:
        left, count = np.asarray(self.rows.left_B), np.asarray(self.rows.count_B)
        busy = [row for row, index in enumerate(self.in_row) if index is not None and (stops or left[row] == 0)]
        if not busy:
            return
        written, ends = np.asarray(self.rows.written_BS), np.asarray(self.ends)
        for row in busy:
            tokens = written[row, : count[row]].copy()
            kept = stops(tokens) if stops else None
            if kept is None and left[row] > 0:
                continue
            # A row that was stopped here goes on idly until the next prompt takes its place.
            index, self.in_row[row] = self.in_row[row], None
            assert index is not None
            stopped = kept is not None or tokens[-1] in ends
            yield Answer(index, tokens[:kept], "stop" if stopped else "length")
