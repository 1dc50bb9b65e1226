"""A draft that knows nothing of the target's features: a table of which token follows which two."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from jeagle.decoding.chain import Measured


class NGramTable:
    """For each two tokens, and each one, the token that most often followed in the training answers.

    Ties go to the lower id. An unseen pair falls back to its last token alone; an unseen token ends the draft.
    """

    def __init__(self, documents: Iterable[tuple[np.ndarray, np.ndarray]]):
        """documents: (ids, supervised) of the training conversations; only answer tokens are counted as followers."""
        following: dict[tuple[int, ...], collections.Counter] = collections.defaultdict(collections.Counter)
        for ids, supervised in documents:
            ids = ids.tolist()
            for place in np.flatnonzero(supervised).tolist():
                for order in (1, 2):
                    if place >= order:
                        following[tuple(ids[place - order : place])][ids[place]] += 1
        self._next = {c: min(f.items(), key=lambda kv: (-kv[1], kv[0]))[0] for c, f in following.items()}

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


def measure(table: NGramTable, prompt: np.ndarray, greedy: np.ndarray, answer: int, draft_tokens: int) -> Measured:
    """Speculative decoding of a known greedy text with a table as the draft.

    Args:
      greedy: the target's tokens, at least `draft_tokens` more than the answer.
      answer: how many of them the answer has.
    """
    text, place, rounds = [*prompt.tolist(), *greedy.tolist()], len(prompt) + 1, []
    while place < len(prompt) + answer:
        drafted = table.draft(text[:place], draft_tokens)
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == text[place + accepted]:
            accepted += 1
        rounds.append(accepted)
        place += accepted + 1
    return Measured(greedy[:answer].tolist(), rounds)
