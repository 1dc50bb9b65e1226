"""Reads the turns of a conversation from columns: lists, pairs, JSON text, tool calls, a server's reply, token ids."""

import json
from collections.abc import Mapping
from typing import Any

from jeagle.data.sources.columns import Columns, plain_name
from jeagle.data.sources.marks import cut_marks, is_cut_mark

SPEAKERS = ("role", "from", "speaker")
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("prompt", "response"), ("question", "answer"))


def ids_message(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Returns the message of a row of token ids with a mask, without padding; ValueError if they do not fit."""
    ids, mask = row[columns.ids], row[columns.mask]
    if not isinstance(ids, list) or not isinstance(mask, list):
        raise ValueError(f"{columns.ids} is not a list of token ids with {columns.mask}")
    if len(ids) == len(mask) == 1 and isinstance(ids[0], list) and isinstance(mask[0], list):  # a batch of one
        ids, mask = ids[0], mask[0]
    here = row.get("attention_mask")
    if isinstance(here, list) and len(here) == len(ids) == len(mask):  # padding goes
        ids, mask = ([x for x, on in zip(values, here, strict=True) if on] for values in (ids, mask))
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{columns.ids} is not a list of token ids")
    if len(mask) != len(ids):
        raise ValueError(f"{columns.mask} and {columns.ids} differ in length")
    if columns.mask == "labels" or -100 in mask:  # transformers' form: the id itself, or -100 where nothing is learnt
        if any(label not in (-100, i) for label, i in zip(mask, ids, strict=True)):
            raise ValueError(f"{columns.mask} are not -100 or the id of {columns.ids} at the same place")
        mask = [label != -100 for label in mask]
    elif any(flag not in (0, 1) for flag in mask):
        raise ValueError(f"{columns.mask} has values other than 0 and 1")
    message: dict[str, Any] = {"role": "ids", "ids": ids, "mask": [bool(flag) for flag in mask]}
    if any(any(mark) if isinstance(mark, list) else mark for mark in cut_marks(row)):
        message["cut"] = True
    return message | ({} if any(mask) else {"learn": False})


def turns_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns a list of turns, which may be stored as JSON text, or as pairs of a prompt and its answer."""
    turns, found = from_json(value), []
    if not isinstance(turns, list):
        raise ValueError(f"column {name} without a list of turns")
    if name == "data" and all(isinstance(turn, str) for turn in turns):  # UltraChat's texts in turn
        turns = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    for turn in turns:
        pair = next((p for p in _PAIRS if isinstance(turn, dict) and set(p) <= turn.keys()), None)
        if isinstance(turn, list) and 0 < len(turn) <= 2 and all(isinstance(text, str) for text in turn):
            speakers = zip(("user", "assistant"), turn, strict=False)
            found += [{"role": role, "content": text} for role, text in speakers]
        elif pair and not {*SPEAKERS} & turn.keys():
            found += [{"role": role, "content": turn[n]} for role, n in zip(("user", "assistant"), pair, strict=True)]
        elif isinstance(turn, dict):
            found.append(turn)
        else:
            raise ValueError(f"column {name} without a list of turns")
    return found


def turns_in(value: Any) -> list[dict[str, Any]] | None:
    """Returns the turns that a prompt or an answer holds instead of a text, or None."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    turns = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    return turns if turns and all(isinstance(t, dict) and {*SPEAKERS} & t.keys() for t in turns) else None


def answer_turns(answer: Any, name: str) -> list[dict[str, Any]]:
    """Returns the turns of an answer: a text, turns, a server's reply, or tool calls (xLAM's "answers")."""
    if turns := turns_in(answer):
        return turns
    if name == "answers" and isinstance(answer, str):
        answer = from_json(answer)
    if isinstance(answer, dict) and "name" in answer and "arguments" in answer:
        answer = [answer]
    if not isinstance(answer, list):
        return [{"role": "assistant"} | (answer if isinstance(answer, dict) else {"content": answer})]
    if answer and all(isinstance(call, dict) and "name" in call for call in answer):
        return [{"role": "assistant", "content": "", "tool_calls": answer}]
    if len(answer) != 1:
        raise ValueError(f"the column {plain_name(name)} has {len(answer)} answers: write one row for each")
    [only] = answer
    if isinstance(only, dict) and isinstance(only.get("message"), dict):  # one of a server's choices
        return [{"role": "assistant"} | only["message"] | {n: v for n, v in only.items() if is_cut_mark(n)}]
    return answer_turns(only, name)


def from_json(value: Any) -> Any:
    """Parses a list or object that is stored as JSON text, as in many datasets."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("a list or object is stored as text that is not valid JSON") from error
