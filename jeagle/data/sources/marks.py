"""Reads which answers of a row were cut off, and which are not to be learnt, wherever the row says so."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

# Names are compared in lower case and without underscores, values in lower case and without the name of an enum.
_FINISH_NAMES = ("finishreason", "finishreasons", "stopreason", "stopreasons", "donereason", "incompletedetails")
_CUT_VALUES = (
    *(
        "length",
        "max_tokens",
        "max_length",
        "max_new_tokens",
        "max_output_tokens",
        "max_completion_tokens",
        "truncated",
    ),
    *("model_length", "token_limit", "context_length", "model_context_window_exceeded", "incomplete"),
    *("content_filter", "abort", "aborted", "cancelled", "timeout", "error"),
)
# Fields that are true or false -> the value that an answer has which was cut off.
_CUT_FLAGS = {"cut": True, "cutoff": True, "iscomplete": False, "isfinished": False, "isreasoningcomplete": False}
_LEARN_FLAGS = (
    dict.fromkeys(("learn", "train", "training", "trainable", "loss", "weight", "lossweight"), True)
    | dict.fromkeys(("lossmask", "trainmask"), True)
    | dict.fromkeys(("masked", "ismasked"), False)
)
_METADATA = ("metadata", "meta", "metainfo", "responsemetadata", "generationinfo", "info")  # may be JSON text


def is_cut_mark(name: Any) -> bool:
    """Whether a field of this name says nothing but how an answer ended."""
    return _plain(name) in (*_FINISH_NAMES, *_CUT_FLAGS)


def is_learn_mark(name: Any) -> bool:
    """Whether a field of a turn with this name says nothing but whether the turn is learnt."""
    return _plain(name) in _LEARN_FLAGS


def cut_marks(tree: Mapping[str, Any], depth: int = 3) -> Iterator[bool | list[bool]]:
    """Yields for each mark in a tree of fields whether the answer was cut off, or a list for several answers."""
    for name, value in tree.items():
        plain = _plain(name)
        if plain in _FINISH_NAMES:
            yield [_is_cut(item) for item in value] if isinstance(value, list) else _is_cut(value)
        elif plain in _CUT_FLAGS and isinstance(value, bool | int | list):
            flags = value if isinstance(value, list) else [value]
            cut = [isinstance(flag, bool | int) and bool(flag) is _CUT_FLAGS[plain] for flag in flags]
            yield cut if isinstance(value, list) else cut[0]
        elif plain in _METADATA and isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                parsed = json.loads(value)
            except (ValueError, RecursionError):
                continue
            if isinstance(parsed, dict) and depth:
                yield from cut_marks(parsed, depth - 1)
        elif isinstance(value, dict) and depth:
            yield from cut_marks(value, depth - 1)
        elif isinstance(value, list) and depth and value and all(isinstance(item, dict) for item in value):
            yield [any(any(m) if isinstance(m, list) else m for m in cut_marks(item, depth - 1)) for item in value]


def is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether an answer is to be learnt.

    Raises:
      ValueError: if a field says so in a way that cannot be followed; the text names it.
    """
    learnt = True
    for name, value in turn.items():
        plain = _plain(name)
        if plain not in _LEARN_FLAGS or value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"a turn has {name} {value!r}: only 0 and 1 can be followed (--data.columns ignore={name})"
            )
        learnt &= bool(value) is _LEARN_FLAGS[plain]
    return learnt


def spread(mark: list[bool], turns: int, answers: list[int]) -> list[bool] | None:
    """Returns one value for each answer from a list for each answer or each turn; None if the list has another length.

    Args:
      turns: number of turns.
      answers: which of them are answers.
    """
    if len(mark) == len(answers):
        return mark
    return [mark[i] for i in answers] if len(mark) == turns else None


def _is_cut(value: Any) -> bool:
    if isinstance(value, dict):  # SGLang writes {"type": "length", "length": 512}
        value = value.get("type", value.get("reason"))
    return isinstance(value, str) and value.lower().rpartition(".")[2] in _CUT_VALUES


@functools.lru_cache(maxsize=4096)
def _plain(name: Any) -> str:
    plain = name.lower().replace("_", "") if isinstance(name, str) else ""
    return "cut" if plain.endswith("truncated") else plain  # is_truncated, was_truncated, response_truncated
