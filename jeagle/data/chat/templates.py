"""Chat templates: choosing one, rendering messages to text with it, and checking the text of an answer.

A template is the tokenizer's own, a user's file, a named one, or one made of headers as in SpecForge.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jeagle.config import DataConfig
from jeagle.data.sources.schema import prompt_ids, shown
from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint

Messages = Sequence[dict[str, Any]]
THINK_START, THINK_END = "<think>", "</think>"

# Name -> the model families that use the template. The files are in data/chat/jinja.
TEMPLATES = {
    "chatml": "models trained on plain ChatML",
    "deepseek": "DeepSeek V3, and with thinking on the models distilled from R1",
    "gemma": "Gemma 1 to 3",
    "gpt-oss": "gpt-oss (harmony)",
    "llama3": "Llama 3",
    "llama3.1": "Llama 3.1 to 3.3",
    "llama4": "Llama 4",
    "mistral": "Mistral 7B v0.3 and Mixtral 8x22B",
    "phi": "Phi 3 and 3.5",
    "phi4": "Phi 4",
    "qwen": "Qwen 2 and 2.5",
    "qwen3-thinking": "Qwen 3, with and without thinking",
    "vicuna": "Vicuna 1.1 to 1.5",
}


def use_template(
    tokenizer: Any, template: str = "", *, user_header: str = "", assistant_header: str = "", end_of_turn: str = ""
) -> Any:
    """Sets the tokenizer's chat template as these settings say, and returns the tokenizer.

    Args:
      template: empty for the tokenizer's own template; a name of `TEMPLATES`; or the path of a Jinja file.
      user_header, assistant_header, end_of_turn: give all three, and no `template`, for a template made of headers.
        A backslash followed by n stands for a line break.

    Raises:
      UserError: if the name is unknown, if the file cannot be read or is not valid Jinja, or if only some of the
        headers are given.
    """
    headers = {"user-header": user_header, "assistant-header": assistant_header, "end-of-turn": end_of_turn}
    if any(headers.values()):
        if missing := [name for name, value in headers.items() if not value]:
            raise UserError(f"--data.{missing[0]} is missing: a template made of headers needs {', '.join(headers)}.")
        if template:
            raise UserError("--data.template and headers exclude each other: give one of them.")
        tokenizer.chat_template = from_headers(*(value.replace("\\n", "\n") for value in headers.values()))
    elif template:
        tokenizer.chat_template = _load_template(template)
    return tokenizer


def from_headers(user_header: str, assistant_header: str, end_of_turn: str) -> str:
    """Returns a Jinja template in which each turn is a header, the text and an end.

    The header of a system turn is the user's header with "system" in place of "user". If the user's header does not
    contain "user", the system text has no header. The template refuses tool calls.
    """
    system_header = user_header.replace("user", "system") if "user" in user_header else ""
    user, assistant, system, end = (
        json.dumps(text, ensure_ascii=False) for text in (user_header, assistant_header, system_header, end_of_turn)
    )
    return (
        "{%- if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
        "{%- if message.tool_calls or message.role == 'tool' %}"
        "{{ raise_exception('a template of headers has no form for tool calls') }}{% endif %}"
        f"{{%- set header = {{'user': {user}, 'assistant': {assistant}, 'system': {system}}}[message.role] %}}"
        f"{{{{- header + message.content + {end} }}}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
    )


def reads_date(template: Any) -> bool:
    """Whether the template writes today's date, so that the rows depend on the day on which they are made."""
    return "strftime_now" in str(template)


def _load_template(template: str) -> str:
    if template in TEMPLATES:
        return (resources.files(__package__) / "jinja" / f"{template}.jinja").read_text("utf-8").removesuffix("\n")
    from jinja2 import Environment

    path = Path(template)
    if not path.is_file():
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give a Jinja file, or one of {', '.join(TEMPLATES)}."
        raise UserError(f"There is no template {template}: {hint}")
    try:
        text = path.read_text("utf-8")
        # transformers removes these two tags, which mark what the assistant generates, before Jinja parses the text.
        without_tags = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).parse(without_tags)
    except Exception as error:  # Jinja raises many kinds of exceptions
        raise UserError(f"The template {path} cannot be used ({error}): correct it.") from error
    return text


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


def sampled_with(tokenizer: Any) -> str:
    """Returns TOKENIZER_HASH/TEMPLATE_HASH, under which sampled token ids are valid."""
    return f"{tokenizer_hash(tokenizer)}/{template_hash(tokenizer)}"


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
    if system_prompt is None or (messages and messages[0]["role"] in ("system", "text", "ids")):
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
        conversations = [[shown(message) for message in request.messages] for request in requests]
        _, tools, thinking, prompt = requests[0]
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

    A plain text is tokenised as it is, and token ids are returned up to the first supervised one.

    Raises:
      ConversationError: if the template cannot render the messages.
    """
    if messages[0]["role"] == "ids":
        return np.asarray(prompt_ids(messages[0]), np.int32)
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
