"""Rows of any chat data -> messages in one form.

A message is {"role": system | user | assistant | tool, "content": text}; an answer may also have "reasoning_content"
and "tool_calls", a tool's result "name" and "tool_call_id". Arguments of calls are objects. A text without turns is
one message of the role "text".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
_MODELS = ("model", "generator")


class Columns(NamedTuple):
    """Which fields of a row hold its conversation.

    Attributes:
      chat: a list of turns.
      prompt, answer: a pair; `more` is put below the prompt where it is not empty (Alpaca's input).
      text: plain text.
    """

    chat: str = ""
    prompt: str = ""
    answer: str = ""
    more: str = ""
    text: str = ""

    def __str__(self) -> str:
        names = [name for name in (self.chat, self.prompt, self.more, self.answer, self.text) if name]
        return ("column " if len(names) == 1 else "columns ") + " and ".join(names)


def find_columns(names: Iterable[str]) -> Columns | None:
    """The columns that hold a conversation, by their names; None where there are none."""
    names = set(names)
    if chat := next((name for name in _CHATS if name in names), ""):
        return Columns(chat=chat)
    prompt = next((name for name in _PROMPTS if name in names), "")
    answer = next((name for name in _ANSWERS if name in names and name != prompt), "")
    if prompt and answer:
        more = "input" if prompt == "instruction" and "input" in names else ""
        return Columns(prompt=prompt, answer=answer, more=more)
    return Columns(text="text") if "text" in names else None


def messages_of(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    """The row's messages. ValueError, KeyError or TypeError says why it has none that can be used."""
    if columns.text:
        turns = [{"role": "text", "content": row[columns.text]}]
    elif columns.chat:
        turns = _from_json(row[columns.chat])
    else:
        turns = _pair(row, columns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{columns} without a list of turns")
    turns = [turn for turn in turns if not _is_empty_system(turn)]
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system.strip() and not columns.text:
        turns = [{"role": "system", "content": system}, *turns]
    if not turns:
        raise ValueError("no turns in it")
    return [_message(turn) for turn in turns]


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that the row offers, as JSON schemas; a text is parsed."""
    tools = _from_json(row.get("tools") or row.get("functions") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools that are no list of functions")
    return tools


def model_of(row: Mapping[str, Any]) -> str:
    """Which model wrote the answers, where the row says so."""
    return next((row[name] for name in _MODELS if isinstance(row.get(name), str)), "")


def _pair(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    prompt, answer = row[columns.prompt], row[columns.answer]
    if isinstance(prompt, list):  # turns before, turns or text after
        return [*prompt, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]
    more = row.get(columns.more) if columns.more else None
    if isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n\n{more}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _is_empty_system(turn: Mapping[str, Any]) -> bool:
    """Data sets of one form for all rows have such a turn where there is none."""
    said = turn.get("content", turn.get("value"))
    return "system" in (turn.get("role"), turn.get("from")) and not (said.strip() if isinstance(said, str) else said)


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker = turn.get("role", turn.get("from", turn.get("speaker")))
    if speaker is None:
        raise ValueError("a turn without a role")
    role = "text" if speaker == "text" else _ROLES.get(speaker if isinstance(speaker, str) else "")
    if role is None:
        raise ValueError(f"a {'role' if 'role' in turn else 'speaker'} {speaker!r}")
    content = _text(turn.get("content", turn.get("value", turn.get("text"))))
    message: dict[str, Any] = {"role": role, "content": content}
    calls: list[dict[str, Any]] = []
    if role == "assistant":
        if speaker == "function_call":
            calls, message["content"] = _calls(_from_json(content)), ""
        else:
            calls = _calls(_from_json(turn.get("tool_calls") or turn.get("function_call") or []))
        reasoning = next((turn[name] for name in _REASONING if isinstance(turn.get(name), str)), "")
        if reasoning.strip():
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
    elif role == "tool":
        message |= {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
    said = message["content"]
    if not isinstance(said, str) or not (said.strip() or calls or role == "tool"):
        raise ValueError("an empty turn, or one that is no text")
    for text in (said, message.get("reasoning_content", "")):
        text.encode()  # a lone surrogate is no text
    return message


def _text(content: Any) -> Any:
    if content is None:
        return ""
    if isinstance(content, list):  # OpenAI's parts
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)}
        if not all(isinstance(part, dict) for part in content) or kinds - {"text"}:
            other = ", ".join(sorted(map(str, kinds - {"text"}))) or "?"
            raise ValueError(f"parts of the kind {other}, which are no text")
        return "".join(part["text"] for part in content)
    return content


def _calls(found: Any) -> list[dict[str, Any]]:
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError("tool calls that are no list")
    calls = []
    for call in found:
        function = _from_json(call).get("function", call)
        arguments = _from_json(function.get("arguments", function.get("parameters", {})) or {})
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise ValueError("a tool call without a name, or whose arguments are no object")
        tree = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | tree)
    return calls


def _from_json(value: Any) -> Any:
    """Many data sets keep lists and objects as text; plain text is no such list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("a list or object that is written as text and is no JSON") from error
