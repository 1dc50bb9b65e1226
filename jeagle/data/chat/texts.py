"""Renders messages to text with the chat template, and checks that the text of an answer is what was rendered."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jeagle.config import DataConfig
from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint

Messages = Sequence[dict[str, Any]]
THINK_START, THINK_END = "<think>", "</think>"


class ConversationError(Exception):
    """The template cannot render a conversation so that its answers can be located; the text says why."""


def template_hash(tokenizer: Any) -> str:
    """Returns 16 hex digits of the chat template's sha256. UserError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "The target's tokenizer has no chat template: choose one with --data.template, or use an instruct model's."
        )
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns 16 hex digits that follow from all that decides ids: vocabulary, merges, splitting, normalisation."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    return fingerprint({name: part for name, part in tree.items() if name not in ("truncation", "padding")})


def parse_arguments(text: str) -> dict[str, Any]:
    """Parses the template's further variables from a JSON object; an empty text gives none.

    Raises:
      UserError: if the text is anything but a JSON object.
    """
    try:
        tree = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"--data.template-arguments {text!r} is not valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise UserError(f'--data.template-arguments {text!r} is not a JSON object, such as {{"date_string": ""}}.')
    return tree


def with_system(messages: Messages, system_prompt: str | None) -> list[dict[str, Any]]:
    """Returns the messages with the system prompt first, if one is given and they do not have their own."""
    if system_prompt is None or (messages and messages[0]["role"] in ("system", "text")):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


class RenderRequest(NamedTuple):
    """One text that the template is to render.

    Attributes:
      messages, tools: the conversation, and JSON schemas of the tools on offer.
      thinking: the value of the template's `enable_thinking`.
      prompt: whether the generation prompt is added at the end.
    """

    messages: Messages
    tools: Sequence[dict[str, Any]]
    thinking: bool
    prompt: bool


class ChatTemplate:
    """Renders texts with a tokenizer's chat template, many at a time.

    Args:
      arguments: further variables of the template.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]):
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        template = str(tokenizer.chat_template)
        # gpt-oss's template calls the reasoning of a message "thinking".
        self._thinking_field = "message.thinking" in template and "reasoning_content" not in template

    def texts(self, requests: Sequence[RenderRequest]) -> list[str | ConversationError]:
        """Returns a text for each request, or the reason why the template cannot render it."""
        texts: list[str | ConversationError] = [ConversationError("not rendered")] * len(requests)
        groups: dict[tuple[int, bool, bool], list[int]] = {}
        for i, request in enumerate(requests):  # requests with tools are rendered one by one
            groups.setdefault((i if request.tools else -1, request.thinking, request.prompt), []).append(i)
        for members in groups.values():
            try:
                many = self._apply([requests[i] for i in members])
            except Exception:  # one of them failed: rendering them one by one shows which, and why
                many = [self._text(requests[i]) for i in members]
            for i, text in zip(members, many, strict=True):
                texts[i] = text
        return texts

    def ids(self, request: RenderRequest) -> list[int]:
        """Returns the ids that transformers' apply_chat_template(tokenize=True) gives for the request."""
        return list(self._apply([request], tokenize=True, return_dict=False)[0])

    def _text(self, request: RenderRequest) -> str | ConversationError:
        try:
            return self._apply([request])[0]
        except Exception as error:  # a template may refuse in any way that Jinja allows
            return ConversationError(f"the chat template refuses it: {error}")

    def _apply(self, requests: Sequence[RenderRequest], **more: Any) -> list[Any]:
        """Renders requests that differ in their messages alone."""
        conversations, (_, tools, thinking, prompt) = [list(request.messages) for request in requests], requests[0]
        if self._thinking_field:
            for messages in conversations:
                messages[:] = [
                    m | {"thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages
                ]
        options = {"tokenize": False, "add_generation_prompt": prompt}
        options |= {"enable_thinking": thinking, "thinking": thinking}  # the names that Qwen and DeepSeek use
        options |= self._arguments | more
        return self._tokenizer.apply_chat_template(conversations, tools=list(tools) or None, **options)


def render_prompt(
    tokenizer: Any,
    messages: Messages,
    *,
    system_prompt: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
    thinking: bool = True,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Int32[np.ndarray, " T"]:
    """Returns the ids of a conversation up to where the target is to answer, generation prompt included.

    A plain text is tokenised as it is.

    Raises:
      ConversationError: if the template cannot render the messages.
    """
    if messages[0]["role"] == "text":
        return np.asarray(tokenizer(messages[0]["content"])["input_ids"], np.int32)
    request = RenderRequest(with_system(messages, system_prompt), tools, thinking, True)
    text = ChatTemplate(tokenizer, arguments).texts([request])[0]
    if isinstance(text, ConversationError):
        raise text
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def enables_thinking(config: DataConfig, answers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the template is told to think for a document with these answers."""
    return any(map(has_reasoning, answers)) if config.thinking == "auto" else config.thinking == "on"


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Whether an answer contains reasoning, in a field of its own or between tags in its text."""
    return bool(message.get("reasoning_content")) or THINK_END in message["content"]


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, str]:
    """Splits an answer into its reasoning and the rest, without the tags and the white space around them."""
    content, reasoning = message["content"], message.get("reasoning_content", "")
    if not reasoning and THINK_END in content:
        reasoning, content = content.split(THINK_END, 1)
        reasoning = reasoning.split(THINK_START, 1)[-1]
    return reasoning.strip(), content.strip()


def without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the message without its reasoning."""
    if message["role"] != "assistant" or not has_reasoning(message):
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    return rest | {"content": split_reasoning(message | {"reasoning_content": ""})[1]}


def check_sampled(sampled: str, message: Mapping[str, Any], *, starts_special: bool) -> None:
    """Checks that `sampled` is what the target would have sampled for `message`.

    It must be exactly the text of the message, apart from white space around it. Before the text there may be the
    reasoning, or a header that begins with a special token (such as the name of a channel), because the target samples
    these too. An empty reasoning block is refused, because no target samples it. Tool calls are written in the
    template's form, but each of them must be present.

    Args:
      sampled: the text between the generation prompt and the end token.
      starts_special: whether its first token is a special token.

    Raises:
      ConversationError: if `sampled` is anything else.
    """
    text, calls = sampled.strip(), message.get("tool_calls", ())
    if text == message["content"].strip() and not calls and not message.get("reasoning_content"):
        return
    reasoning, content = split_reasoning(message)
    if missing := [call["function"]["name"] for call in calls if call["function"]["name"] not in text]:
        raise ConversationError(f"the template does not write tool calls ({missing[0]})")
    if reasoning and reasoning not in text:
        raise ConversationError("the template does not write the reasoning: --data.reasoning drop removes it")
    if content not in text or not (calls or text.endswith(content)):
        raise ConversationError("the template puts text other than the answer before the end token")
    if reasoning or calls or starts_special:
        return
    lead = text[: len(text) - len(content)] if content else text
    if lead.replace(THINK_START, "").replace(THINK_END, "").strip() == "":
        raise ConversationError(
            "the template puts an empty reasoning block into the answer, which the target does not sample: use "
            "--data.thinking off"
        )
    raise ConversationError("the template puts text other than the answer before the end token")
