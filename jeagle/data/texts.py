"""Messages -> text, by the chat template, many at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from jeagle.data.answers import ConversationError, has_reasoning
from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint

Messages = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How conversations are rendered.

    Attributes:
      end_token_ids: ids that may end an answer.
      system_prompt: added where a conversation has none; None adds none.
      thinking: what a template that knows `enable_thinking` is told: on where an answer has reasoning, on, or off.
      reasoning: whether what answers think is kept.
      rewritten: what becomes of a conversation whose template renders earlier turns otherwise once more follow: one
        document for each answer, as a server sees it, or none.
      arguments: further variables of the template.
    """

    end_token_ids: tuple[int, ...]
    system_prompt: str | None = None
    thinking: Literal["auto", "on", "off"] = "auto"
    reasoning: Literal["keep", "drop"] = "keep"
    rewritten: Literal["per_answer", "set_aside"] = "per_answer"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def thinks(self, answers: Sequence[Mapping[str, Any]]) -> bool:
        return any(map(has_reasoning, answers)) if self.thinking == "auto" else self.thinking == "on"


class Request(NamedTuple):
    """One rendering by the template."""

    messages: Messages
    tools: Sequence[dict[str, Any]]
    thinking: bool
    prompt: bool


def template_hash(tokenizer: Any) -> str:
    """16 hex digits of the chat template's sha256. UserError where the tokenizer has none."""
    if not tokenizer.chat_template:
        raise UserError(
            "The target's tokenizer has no chat template: name one with --data.template, or use an instruct model's."
        )
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits over everything that decides ids: the vocabulary, merges, splitting, normalising."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    return fingerprint({name: part for name, part in tree.items() if name not in ("truncation", "padding")})


def parse_arguments(text: str) -> dict[str, Any]:
    """A template's further variables, from a JSON object; nothing from an empty text. UserError for anything else."""
    try:
        tree = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"--data.template-arguments {text!r} is no JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise UserError(f'--data.template-arguments {text!r} is no JSON object, such as {{"date_string": ""}}.')
    return tree


def with_system(messages: Messages, system_prompt: str | None) -> list[dict[str, Any]]:
    """`messages`, led by the system prompt where one is given and they have none."""
    if system_prompt is None or (messages and messages[0]["role"] in ("system", "text")):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


class TextMaker:
    """The template's texts, many at a time."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]):
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        template = str(tokenizer.chat_template)
        self._says_thinking = "message.thinking" in template and "reasoning_content" not in template  # as gpt-oss's

    def texts(self, requests: Sequence[Request]) -> list[str | ConversationError]:
        """A text for each request, or why there is none."""
        found: list[str | ConversationError] = [ConversationError("not rendered")] * len(requests)
        groups: dict[tuple[bool, bool], list[int]] = {}
        for i, request in enumerate(requests):
            if request.tools or not request.messages:
                found[i] = self._one(request)
            else:
                groups.setdefault((request.thinking, request.prompt), []).append(i)
        for (thinking, prompt), members in groups.items():
            try:
                many = self._apply([list(requests[i].messages) for i in members], None, thinking, prompt)
            except Exception:  # one of them; which, and why, they tell one by one
                many = [self._one(requests[i]) for i in members]
            for i, text in zip(members, many, strict=True):
                found[i] = text
        return found

    def ids(self, messages: Messages, tools: Sequence[dict], thinking: bool) -> list[int]:
        """What transformers makes of the messages."""
        return list(self._apply(list(messages), list(tools) or None, thinking, False, tokenize=True, return_dict=False))

    def _one(self, request: Request) -> str | ConversationError:
        try:
            tools = list(request.tools) or None
            return self._apply(list(request.messages), tools, request.thinking, request.prompt)
        except Exception as error:  # a template may refuse in any way that Jinja allows
            return ConversationError(f"the chat template refuses it: {error}")

    def _apply(self, messages: list, tools: list | None, thinking: bool, prompt: bool, **more: Any) -> Any:
        switches = {"enable_thinking": thinking, "thinking": thinking}  # Qwen's and DeepSeek's names
        if self._says_thinking:
            many = bool(messages) and isinstance(messages[0], list)
            messages = [_saying_thinking(chat) for chat in messages] if many else _saying_thinking(messages)
        options = {"tokenize": False, "add_generation_prompt": prompt, **switches, **self._arguments}
        return self._tokenizer.apply_chat_template(messages, tools=tools, **(options | more))


def _saying_thinking(messages: Messages) -> list[dict[str, Any]]:
    return [m | {"thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages]


def render_prompt(
    tokenizer: Any,
    messages: Messages,
    *,
    system_prompt: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
    thinking: bool = True,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> np.ndarray:
    """ids int32 [n] of a conversation up to where the target is to answer; of a text, of what is there of it."""
    if messages[0]["role"] == "text":
        return np.asarray(tokenizer(messages[0]["content"])["input_ids"], np.int32)
    request = Request(with_system(messages, system_prompt), tools, thinking, True)
    text = TextMaker(tokenizer, arguments).texts([request])[0]
    if isinstance(text, ConversationError):
        raise text
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
