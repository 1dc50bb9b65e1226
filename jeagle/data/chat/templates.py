"""Chat templates: choosing one, and rendering messages to text with it.

A template is the tokenizer's own, a user's file, a named one, or one made of headers as in SpecForge.
"""

import datetime
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.data.sources.schema import shown
from jeagle.errors import UserError
from jeagle.places import expanded
from jeagle.runtime.manifest import fingerprint

Messages = Sequence[dict[str, Any]]
_STARTED = datetime.datetime.now()

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
      template: empty for the tokenizer's own template; the name of one of several that it has, or of `TEMPLATES`; or
        the path of a Jinja file.
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
        own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        tokenizer.chat_template = own[template] if template in own else _load_template(template, own)
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


def with_one_time(template: Any) -> str | None:
    """Returns a template that writes the time at which this process started, wherever it would write the present one.

    Some templates write seconds, and the texts of a conversation are compared with one another.

    Args:
      template: a tokenizer's; of several (a dict) or of none, None is returned, which stands for the tokenizer's own.
    """
    if not isinstance(template, str):
        return None

    def written(call: re.Match) -> str:
        return json.dumps(_STARTED.strftime(call[2]), ensure_ascii=False)

    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", written, template)


def reads_date(template: Any) -> bool:
    """Whether the template writes today's date, so that the rows depend on the day on which they are made."""
    return "strftime_now" in str(template)


def _load_template(template: str, own: Iterable[str] = ()) -> str:
    if template in TEMPLATES:
        return (resources.files(__package__) / "jinja" / f"{template}.jinja").read_text("utf-8").removesuffix("\n")
    from jinja2 import Environment

    path = Path(expanded(template))
    if not path.is_file():
        near = difflib.get_close_matches(template, [*own, *TEMPLATES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"give a Jinja file, or one of {', '.join([*own, *TEMPLATES])}."
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
    """Returns 16 hex digits of the chat template's sha256; empty for none, which texts and ids need not."""
    template = tokenizer.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else ""


def check_template(tokenizer: Any) -> None:
    """UserError if the tokenizer has no chat template for conversations, or several of which none is the default."""
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            "The target's tokenizer has no chat template: choose one with --data.template, or use an instruct model's."
        )
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"The target's tokenizer has several chat templates and no default: choose one with --data.template "
            f"({', '.join(sorted(template))})."
        )


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
      messages, tools: the conversation, as `ChatTemplate.shown` returns it, and JSON schemas of the tools on offer.
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
        self.source = str(tokenizer.chat_template)
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        self._rendered = with_one_time(tokenizer.chat_template)
        # Other names of a message's reasoning: those of gpt-oss, Gemma 4, MiniCPM3, and of Command A before a call.
        names = ("thinking", "reasoning", "thought", "tool_plan")
        self._aliases = [n for n in names if re.search(rf"\.{n}\b|get\(.{n}.|\[.{n}.\]|.{n}. in ", self.source)]

    def texts(self, requests: Sequence[RenderRequest]) -> list[str | ConversationError]:
        """Returns a text for each request, or the reason why the template cannot render it. UserError without one."""
        if requests:
            check_template(self._tokenizer)
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
        check_template(self._tokenizer)
        return list(self._apply([request], tokenize=True, return_dict=False)[0])

    def shown(self, messages: Messages) -> list[dict[str, Any]]:
        """Returns the messages as servers show them to the template.

        They have no marks. The arguments of tool calls are objects and empty content is an empty text, unless the
        template needs the arguments as text, or null content, to write a call.
        """
        return [message if message.keys() <= {"role", "content"} else self._shown(message) for message in messages]

    def _shown(self, message: dict[str, Any], form: tuple[bool, bool] | None = None) -> dict[str, Any]:
        seen = shown(message)
        if reasoning := seen.get("reasoning_content"):
            seen |= dict.fromkeys(self._aliases, reasoning)
        if not seen.get("tool_calls"):
            return seen
        as_text, null = self._form_of_calls if form is None else form
        if as_text:
            seen["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": _argument_text(original["function"]["arguments"])}}
                for call, original in zip(seen["tool_calls"], message["tool_calls"], strict=True)
            ]
        return seen | {"content": None} if null and not seen["content"] else seen

    @functools.cached_property
    def _form_of_calls(self) -> tuple[bool, bool]:
        """Whether the template needs the arguments of tool calls as text, and null for empty content."""
        for form in ((False, False), (False, True), (True, False), (True, True)):
            messages = [{"role": "user", "content": "?"}, self._shown(PROBE_CALL, form)]
            for tools in ((PROBE_TOOL,), ()):
                [text] = self.texts([RenderRequest(messages, tools, False, False)])
                written = text.rpartition(_CALL_NAME)[2] if isinstance(text, str) else ""
                # An object that is joined to a text appears in Python's notation, and a text as JSON within JSON.
                if PROBE_VALUE in written and not re.search(rf"'{_CALL_KEY}'|\\\\\"{_CALL_KEY}", written):
                    return form
        return False, False

    def _text(self, request: RenderRequest) -> str | ConversationError:
        try:
            return self._apply([request])[0]
        except Exception as error:  # a template may refuse in any way that Jinja allows
            return ConversationError(f"the chat template refuses it: {error}")

    def _apply(self, requests: Sequence[RenderRequest], **more: Any) -> list[Any]:
        """Renders requests that differ in their messages alone."""
        _, tools, thinking, prompt = requests[0]
        options = {"chat_template": self._rendered, "tokenize": False, "add_generation_prompt": prompt}
        options |= {"enable_thinking": thinking, "thinking": thinking}  # the names that Qwen and DeepSeek use
        options |= self._arguments | more
        conversations = [list(request.messages) for request in requests]
        return self._tokenizer.apply_chat_template(conversations, tools=list(tools) or None, **options)


def _argument_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# A tool and a call of it, whose texts occur in no template. Mistral's templates want an id of nine characters.
_CALL_NAME, _CALL_KEY, PROBE_VALUE = "jeaglecall", "jeaglekey", "jeaglevalue"
_PARAMETERS = {"type": "object", "properties": {_CALL_KEY: {"type": "string", "description": "?"}}, "required": []}
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": _CALL_NAME, "description": "?", "parameters": _PARAMETERS},
}
PROBE_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "jeaglecal",
            "type": "function",
            "function": {"name": _CALL_NAME, "arguments": {_CALL_KEY: PROBE_VALUE}},
        }
    ],
}
