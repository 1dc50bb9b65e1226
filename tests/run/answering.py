"""Regenerates answers with a stand-in for a target, and prepares them: what was sampled, and what is then learnt."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jeagle import data, targets
from jeagle.config import DataConfig
from jeagle.run import answers
from jeagle.run.assemble import LoadedTarget

Sampler = Callable[[str, int], tuple[list[int], bool]]  # (prompt's text, turn) -> (token ids, whether the answer ended)


def random_sampler(tokenizer: Any, ends: Sequence[int], seed: int, most: int = 12) -> Sampler:
    """Any tokens, special ones too: as a target without training samples them."""
    generator, vocab = random.Random(seed), len(tokenizer)

    def sample(prompt: str, turn: int) -> tuple[list[int], bool]:
        ids = [i for i in generator.choices(range(vocab), k=generator.randrange(most)) if i not in ends]
        ended = generator.random() < 0.6 or not ids
        return ids + [generator.choice(list(ends))] * ended, ended

    return sample


def regenerate(
    tokenizer: Any, ends: Sequence[int], prompts: list[dict], out: Path, sample: Sampler, **settings: Any
) -> tuple[list[dict], set[tuple]]:
    """Answers all turns; returns the rows, and (the ids before an answer, the ids of the answer) of every turn.

    No two turns may have the same number, because their randomness would be the same.
    """
    sampled: set[tuple] = set()

    def generate(target, prompts, *, follow_up, numbers, **_):
        used = list(numbers)
        waiting = deque((i, prompt, 0) for i, prompt in enumerate(prompts))
        while waiting:
            i, prompt, turn = waiting.popleft()
            ids, ended = sample(tokenizer.decode(prompt), turn)
            sampled.add((tuple(np.asarray(prompt).tolist()), tuple(ids)))
            answer = targets.GeneratedAnswer(i, np.asarray(ids, np.int32), "stop" if ended else "length")
            if (following := follow_up(answer)) is not None:
                waiting.append((i, following[0], turn + 1))
                used.append(following[1])
            yield answer
        assert len(set(used)) == len(used) and max(used) < 1 << 32

    spec = SimpleNamespace(max_positions=1 << 20, vocab=len(tokenizer))
    loaded = LoadedTarget(None, tokenizer, tuple(ends), SimpleNamespace(spec=spec))  # type: ignore[arg-type]
    args = answers.RegenerateArguments("stand-in", out, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers.targets, "generate", generate)
        return answers.regenerate(args, prompts, lambda: loaded), sampled


def prepare(
    tokenizer: Any, ends: Sequence[int], source: Path, folder: Path, **settings: Any
) -> tuple[set[tuple], dict[str, Any]]:
    """Prepares a file; returns (the ids before a supervised run, its ids) of every run, and the statistics."""
    config = DataConfig(**{"row_length": 2048, "held_out": 0.0, "bad_share": 1.0} | settings)
    folder.mkdir()
    statistics = data.prepare_rows(
        data.parse_source(str(source)), tokenizer, config, folder, end_token_ids=tuple(ends), vocab=len(tokenizer)
    )
    learnt: set[tuple] = set()
    for ids, supervised in documents(folder / "train"):
        edges = np.flatnonzero(np.diff(np.pad(supervised.astype(int), 1))).reshape(-1, 2)
        learnt |= {(tuple(ids[:a].tolist()), tuple(ids[a:b].tolist())) for a, b in edges}
    return learnt, statistics


def documents(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    tokens, segments, supervised = (np.load(folder / f"{n}.npy") for n in ("tokens", "segments", "supervised"))
    found = []
    for row in range(len(tokens)):
        for segment in range(1, int(segments[row].max(initial=0)) + 1):
            mine = segments[row] == segment
            found.append((tokens[row][mine], supervised[row][mine].astype(bool)))
    return found


def without_ids(source: Path, out: Path) -> Path:
    """A copy of a file of answers in which the sampled ids are missing."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        for message in row["messages"]:
            message.pop("sampled_ids", None)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return out
