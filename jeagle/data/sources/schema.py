"""Converts rows of any chat dataset to messages in one form.

A message is {"role": system | user | assistant | tool, "content": text}. A tool message may also have "name" and
"tool_call_id". An assistant message may also have
  "reasoning_content"  text
  "tool_calls"         in OpenAI's form; the arguments are an object or JSON text, as the row has them
  "cut": True          a length limit cut off this answer, so that its end is not supervised
  "learn": False       this answer is not supervised
  "sampled_ids"        the token ids that the target sampled for this answer, its end token included if it ended
A row without turns becomes one message: {"role": "text", "content": text} for plain text, of which every token is
supervised, or {"role": "ids", "ids": token ids, "mask": whether each of them is supervised}.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_ROLES = (
    {"human": "user", "user": "user", "prompter": "user", "system": "system", "developer": "system"}
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool")
)
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "user")
_ANSWERS = ("response", "completion", "output", "answer", "solution", "generation", "assistant")
_REASONING = ("reasoning_content", "reasoning", "thinking")
ANSWERING = ("assistant", "text", "ids")  # the roles of messages that have supervised tokens
MARKS = ("cut", "learn", "sampled_ids", "sampled_hash")  # fields of a message that a chat template never sees


class Columns(NamedTuple):
    """The fields of a row that hold its conversation.

    Attributes:
      chat: the field with a list of turns.
      prompt, answer: the fields of a prompt and its answer.
      more: a field that is appended to the prompt if it is not empty (Alpaca's "input").
      text: the field with plain text.
    """

    chat: str = ""
    prompt: str = ""
    answer: str = ""
    more: str = ""
    text: str = ""

    def __str__(self) -> str:
        names = [name for name in (self.chat, self.prompt, self.more, self.answer, self.text) if name]
        return ("column " if len(names) == 1 else "columns ") + " and ".join(names)


def find_columns(row: Any, known: Columns | None = None) -> Columns:
    """Returns the columns that hold the row's conversation: the known ones if the row has them, else recognised ones.

    Raises:
      ValueError: if the row has no such columns.
    """
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object: write one conversation per line")
    if known and all(name in row for name in (known.chat, known.prompt, known.answer, known.text) if name):
        return known
    if chat := next((name for name in _CHATS if name in row), ""):
        return Columns(chat=chat)
    prompt = next((name for name in _PROMPTS if name in row), "")
    answer = next((name for name in _ANSWERS if name in row and name != prompt), "")
    if prompt and answer:
        return Columns(prompt=prompt, answer=answer, more="input" if prompt == "instruction" and "input" in row else "")
    if "text" in row:
        return Columns(text="text")
    raise ValueError("the row has no messages, no conversations, no prompt with a response, and no text")


def messages_of(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    """Returns the row's messages.

    Raises:
      ValueError, KeyError or TypeError: if the row has no usable messages; the text says why.
    """
    if columns.text:
        turns = [{"role": "text", "content": row[columns.text]}]
    elif columns.chat:
        turns = _from_json(row[columns.chat])
    else:
        prompt, answer = row[columns.prompt], row[columns.answer]
        more = row.get(columns.more) if columns.more else None
        if isinstance(prompt, list):  # the prompt is a list of turns; the answer is a list of turns or a text
            turns = [*prompt, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]
        else:
            prompt = f"{prompt}\n\n{more}" if isinstance(more, str) and more.strip() else prompt
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{columns} without a list of turns")
    turns = [turn for turn in turns if not _is_empty_system(turn)]
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system.strip() and not columns.text:
        turns = [{"role": "system", "content": system}, *turns]
    if not turns:
        raise ValueError("the row has no turns")
    return [_message(turn) for turn in turns]


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the tools that the row offers, as JSON schemas; tools that are stored as text are parsed."""
    tools = _from_json(row.get("tools") or row.get("functions") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("the tools are not a list of functions")
    return tools


def shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the message without its marks, and with the arguments of its tool calls as objects."""
    plain = {name: value for name, value in message.items() if name not in MARKS}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _from_json(call["function"]["arguments"])}}
            for call in calls
        ]
    return plain


def prompt_ids(message: Mapping[str, Any]) -> list[int]:
    """Returns the token ids before the first supervised one of a message with the role "ids"."""
    ids, mask = message["ids"], list(message["mask"])
    return ids[: mask.index(True)] if True in mask else ids


def _is_empty_system(turn: Mapping[str, Any]) -> bool:
    """Whether this is an empty system turn, as datasets have it whose rows must all have the same form."""
    content = turn.get("content", turn.get("value"))
    is_empty = not (content.strip() if isinstance(content, str) else content)
    return is_empty and "system" in (turn.get("role"), turn.get("from"))


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker = turn.get("role", turn.get("from", turn.get("speaker")))
    if speaker is None:
        raise ValueError("a turn has no role")
    role = "text" if speaker == "text" else _ROLES.get(speaker if isinstance(speaker, str) else "")
    if role is None:
        raise ValueError(f"a turn has the unknown {'role' if 'role' in turn else 'speaker'} {speaker!r}")
    content = _text(turn.get("content", turn.get("value", turn.get("text"))))
    message: dict[str, Any] = {"role": role, "content": content}
    calls: list[dict[str, Any]] = []
    if role == "assistant":
        if speaker == "function_call":
            calls, message["content"] = _tool_calls(_from_json(content)), ""
        else:
            calls = _tool_calls(_from_json(turn.get("tool_calls") or turn.get("function_call") or []))
        reasoning = next((turn[name] for name in _REASONING if isinstance(turn.get(name), str)), "")
        if reasoning.strip():
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
    elif role == "tool":
        message |= {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
    text = message["content"]
    if not isinstance(text, str) or not (text.strip() or calls or role == "tool"):
        raise ValueError("a turn is empty or is not text")
    for part in (text, message.get("reasoning_content", "")):
        part.encode()  # raises UnicodeError for a lone surrogate
    return message


def _text(content: Any) -> Any:
    if content is None:
        return ""
    if isinstance(content, list):  # a list of parts, as in OpenAI's API
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)}
        if not all(isinstance(part, dict) for part in content) or kinds - {"text"}:
            other = ", ".join(sorted(map(str, kinds - {"text"}))) or "?"
            raise ValueError(f"a turn has parts of type {other}, but only text is supported")
        return "".join(part["text"] for part in content)
    return content


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise ValueError("the tool calls are not a list")
    parsed = []
    for call in calls:
        function = _from_json(call).get("function", call)
        arguments = function.get("arguments", function.get("parameters", {})) or {}
        if not isinstance(function.get("name"), str) or not isinstance(_from_json(arguments), dict):
            raise ValueError("a tool call has no name, or its arguments are not an object")
        tree = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        parsed.append(({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | tree)
    return parsed


def _from_json(value: Any) -> Any:
    """Parses a list or object that is stored as JSON text, as in many datasets."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("a list or object is stored as text that is not valid JSON") from error
