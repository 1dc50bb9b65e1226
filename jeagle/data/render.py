"""Conversations -> token ids and the mask of what the target itself would have sampled.

The mask comes from the tokenizer's own chat template: whatever stands between the generation prompt and the end of an
answer, the end token included. No pattern guesses at headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint

Messages = Sequence[dict[str, Any]]


class Rendered(NamedTuple):
    """ids int32 [n] and supervised bool [n] of one conversation."""

    ids: np.ndarray
    supervised: np.ndarray


class ConversationError(Exception):
    """A conversation that the template cannot render so that answers are found exactly; the text says why."""


def template_hash(tokenizer: Any) -> str:
    """16 hex digits of the chat template's sha256. UserError where the tokenizer has none."""
    if not tokenizer.chat_template:
        raise UserError("The target's tokenizer has no chat template: use an instruct model's tokenizer.")
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits over everything that decides ids: the vocabulary, merges, splitting, normalising."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    return fingerprint({name: part for name, part in tree.items() if name not in ("truncation", "padding")})


def with_system(messages: Messages, system_prompt: str | None) -> list[dict[str, Any]]:
    """`messages`, led by the system prompt where one is given and they have none."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def render_prompt(tokenizer: Any, messages: Messages, *, system_prompt: str | None = None) -> np.ndarray:
    """ids int32 [n] of a conversation up to where the target is to answer."""
    text = _text(tokenizer, with_system(messages, system_prompt), prompt=True)
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    end_token_ids: Sequence[int],
    system_prompt: str | None = None,
    truncated: bool = False,
    check_ids: bool = False,
) -> Rendered:
    """One conversation's ids and mask.

    Args:
      end_token_ids: ids that may end an answer.
      truncated: the last answer was cut off by a length limit: its end token is the template's, not the target's, and
        is not learnt.
      check_ids: compare with apply_chat_template(tokenize=True), which costs a second tokenisation.

    Raises:
      ConversationError: when the template refuses, rewrites history, or puts anything but the answer and one end token
        between the generation prompt and the next turn.
    """
    messages = with_system(messages, system_prompt)
    whole = _text(tokenizer, messages, prompt=False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], np.int32)
    if tokenizer.bos_token_id is not None and ids[:2].tolist() == [tokenizer.bos_token_id] * 2:
        raise ConversationError("the template begins with the bos token twice")
    starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(ids), bool)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        begin = _answer_start(tokenizer, messages, i, whole)
        stop = _answer_stop(whole, begin, messages[i]["content"], ids, starts, ends, set(end_token_ids))
        # By their ends: some tokenizers leave a leading space out of a token's start.
        first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, stop)
        if starts[first] < begin:
            raise ConversationError("the tokenizer joins the answer with the text around it")
        keep_end = not (truncated and i == answers[-1])
        supervised[first : last + keep_end] = True
    if check_ids:
        _check_ids(tokenizer, messages, ids)
    return Rendered(ids, supervised)


def _text(tokenizer: Any, messages: Messages, *, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raise ConversationError(f"the chat template refuses it: {error}") from error


def _answer_start(tokenizer: Any, messages: Messages, i: int, whole: str) -> int:
    prefix = _text(tokenizer, messages[:i], prompt=True)
    if not whole.startswith(prefix):
        raise ConversationError("the chat template renders earlier turns differently once more follow")
    return len(prefix)


def _answer_stop(whole: str, begin: int, content: str, ids, starts, ends, end_ids: set[int]) -> int:
    """Where the first end token after the answer ends, in characters."""
    first = np.searchsorted(ends, begin, side="right")
    for place in range(first, len(ids)):
        if int(ids[place]) in end_ids:
            sampled = whole[begin : starts[place]]
            if sampled.strip() != str(content).strip():
                raise ConversationError("the template puts other text than the answer before the end token")
            return int(ends[place])
    raise ConversationError("no end token follows the answer")


def _check_ids(tokenizer: Any, messages: Messages, ids: np.ndarray) -> None:
    theirs = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
    if list(theirs) != ids.tolist():
        first = next((i for i, (a, b) in enumerate(zip(theirs, ids.tolist(), strict=False)) if a != b), len(ids))
        raise ConversationError(f"its ids differ from apply_chat_template's at token {first}")
