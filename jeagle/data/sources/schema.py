"""Converts rows of any chat dataset to messages in one form.

A message is {"role": system | user | assistant | tool, "content": text}. A tool message may also have "name" and
"tool_call_id". An assistant message may also have
  "reasoning_content"  text
  "tool_calls"         in OpenAI's form; the arguments are an object or JSON text, as the row has them
  "cut": True          a length limit cut off this answer, so that its end is not supervised
  "learn": False       this answer is not supervised
  "sampled_ids"        the token ids that the target sampled for this answer, its end token included if it ended
  "sampled_hash"       the fingerprint of these ids
A row without turns becomes one message: {"role": "text", "content": text} for plain text, of which every token is
supervised, or {"role": "ids", "ids": token ids, "mask": whether each of them is supervised}.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jeagle.data.sources.columns import (
    LEARN_LISTS,
    NAMES,
    TOOLS,
    Columns,
    check_media,
    is_choices,
    is_contained,
    is_full,
    is_switch,
    plain_name,
)
from jeagle.data.sources.marks import cut_marks, is_cut_mark, is_learn_mark, is_learnt, spread
from jeagle.data.sources.turns import SPEAKERS, answer_turns, from_json, ids_message, turns_in, turns_of

_ROLES = (
    {"human": "user", "user": "user", "prompter": "user", "system": "system", "developer": "system"}
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant")
    | dict.fromkeys(("function_call", "tool_call"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool")
)
_TEXTS = ("content", "value", "text", "system_prompt")  # where a turn may have its text
_PART_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "thinking": "thinking", "reasoning": "text"}
ANSWERING = ("assistant", "text", "ids")  # the roles of messages that have supervised tokens
MARKS = ("cut", "learn", "sampled_ids", "sampled_hash")  # fields of a message that a chat template never sees
_READ = {*SPEAKERS, *NAMES["reasoning"], "tool_calls", "function_call", "name", "tool_call_id", *MARKS}


def messages_of(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    """Returns the row's messages.

    Raises:
      ValueError, KeyError or TypeError: if the row has no usable messages; the text says why.
    """
    row = {name: value for name, value in row.items() if value is not None and name not in columns.ignore}
    if columns.ids:
        return [ids_message(row, columns)]
    if columns.text:
        turns = [{"role": "text", "content": row[columns.text]}]
    elif columns.chat:
        turns = turns_of(row[columns.chat], columns.chat)
    else:
        turns = turns_in(row[columns.prompt]) or [{"role": "user", "content": row[columns.prompt]}]
        answer = answer_turns(row[columns.answer], columns.answer) if columns.answer else []
        begins = bool(answer) and _role(answer[0]) != "assistant"  # the answer is a whole conversation
        turns = answer if begins and _content(turns[-1]) in map(_content, answer) else [*turns, *answer]
    if not turns:
        raise ValueError(f"{columns} without a list of turns")
    turns = [{n: value for n, value in turn.items() if value is not None and n not in columns.ignore} for turn in turns]
    _add_context(turns, row, columns)
    if columns.history:
        turns = [*map(dict, turns_of(row[columns.history], columns.history)), *turns]
    if is_choices(row.get("choices")) and columns.chat and _role(turns[-1]) != "assistant":
        turns += answer_turns(row["choices"], "choices")
    _mark(turns, row, columns)
    if not columns.text:
        _add_columns(turns, row, columns)
        turns = [turn for turn in turns if not _is_empty_system(turn)]
    if not turns:
        raise ValueError("the row has no turns")
    return [_message(turn) for turn in turns]


def tools_of(row: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the tools that the row offers, as JSON schemas; tools that are stored as text are parsed."""
    name = next((name for name in TOOLS if is_full(row.get(name)) and name not in ignore), "")
    tools = from_json(row[name]) if name else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("the tools are not a list of functions")
    return tools


def unused_fields(row: Mapping[str, Any], columns: Columns, messages: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the fields of the row's turns with content that is not used, as COLUMN.FIELD."""
    turns, found = row.get(columns.chat), set()
    texts = [m[name] for m in messages for name in ("content", "reasoning_content") if name in m]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            names = turn.keys() - _READ - {_text_field(turn), *columns.ignore}
            names = {n for n in names if is_full(turn[n]) and not (is_cut_mark(n) or is_learn_mark(n))}
            found |= {f"{columns.chat}.{plain_name(n)}" for n in names if not is_contained(turn[n], texts)}
    return found


def shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the message without its marks, and with the arguments of its tool calls as objects."""
    plain = {name: value for name, value in message.items() if name not in MARKS}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": from_json(call["function"]["arguments"])}}
            for call in calls
        ]
    return plain


def prompt_ids(message: Mapping[str, Any]) -> list[int]:
    """Returns the token ids before the first supervised one of a message with the role "ids"."""
    ids, mask = message["ids"], list(message["mask"])
    return ids[: mask.index(True)] if True in mask else ids


def _mark(turns: list[dict[str, Any]], row: Mapping[str, Any], columns: Columns) -> None:
    """Marks the turns that the row's own columns say were cut off, or are not to be learnt."""
    answers = [i for i, turn in enumerate(turns) if _role(turn) in ANSWERING]
    if not answers:
        return
    rest = {name: value for name, value in row.items() if name not in (*columns.used(), *TOOLS)}
    for mark in cut_marks(rest):
        if isinstance(mark, bool) or len(mark) == 1:
            flags = [False] * (len(answers) - 1) + [mark if isinstance(mark, bool) else mark[0]]
        else:  # a list of another length may be about any of them
            flags = spread(mark, len(turns), answers) or [any(mark)] * len(answers)
        for i, flag in zip(answers, flags, strict=True):
            if flag:
                turns[i]["cut"] = True
    for name in LEARN_LISTS:
        if isinstance(values := rest.get(name), list):
            learnt = spread(values, len(turns), answers)
            if learnt is None:
                raise ValueError(f"the column {name} has neither one value for each turn nor for each answer")
            for i, flag in zip(answers, learnt, strict=True):
                turns[i]["learn"] = is_learnt(turns[i]) and is_learnt({"loss_mask": flag})
    if len({turns[i]["mask"] for i in answers if isinstance(turns[i].get("mask"), bool)}) > 1:
        raise ValueError("the turns differ in mask, which may mean learnt or left out: --data.columns ignore=mask")


def _add_context(turns: list[dict[str, Any]], row: Mapping[str, Any], columns: Columns) -> None:
    """Appends the context, which stands in columns beside the turns, to the first user's turn."""
    for name in columns.context:
        first = next((turn for turn in turns if _role(turn) == "user"), None)
        if first is not None and not is_contained(row[name], [_parts(_content(first))[0]]):
            text = row[name] if isinstance(row[name], str) else json.dumps(row[name], ensure_ascii=False)
            first |= {_text_field(first): f"{_parts(_content(first))[0]}\n\n{text}"}


def _add_columns(turns: list[dict[str, Any]], row: Mapping[str, Any], columns: Columns) -> None:
    """Adds the reasoning and the system prompt that stand in columns beside the turns."""
    answers = [turn for turn in turns if _role(turn) == "assistant"]
    if columns.reasoning and not answers and not is_switch(row[columns.reasoning]):
        raise ValueError(f"the column {columns.reasoning} belongs to no answer")
    if columns.reasoning and not is_switch(row[columns.reasoning]):
        reasoning = _reasoning_text(row[columns.reasoning])
        texts = [text for turn in answers for text in (_parts(_content(turn))[0], _reasoning(turn))]
        if not is_contained(reasoning, texts):
            if len(answers) > 1 and columns.chat:
                raise ValueError(
                    f"the column {columns.reasoning} does not say which answer it belongs to: --data.columns "
                    f"ignore={columns.reasoning} leaves it out"
                )
            answers[-1]["reasoning_content"] = reasoning
    system = row.get(columns.system, "")
    if not is_full(system):
        return
    own = next((_parts(_content(turn))[0].strip() for turn in turns if _role(turn) == "system"), "")
    if own and own != _parts(system)[0].strip():
        raise ValueError(
            f"the column {columns.system} differs from the system turn: --data.columns ignore={columns.system} takes "
            "the turn"
        )
    if not own:
        turns.insert(0, {"role": "system", "content": system})


def _role(turn: Mapping[str, Any]) -> str | None:
    speaker = turn.get("role") or turn.get("from") or turn.get("speaker")
    return "text" if speaker == "text" else _ROLES.get(speaker.lower() if isinstance(speaker, str) else "")


def _text_field(turn: Mapping[str, Any]) -> str:
    return next((name for name in _TEXTS if turn.get(name) is not None), _TEXTS[0])


def _content(turn: Mapping[str, Any]) -> Any:
    return turn.get(_text_field(turn))


def _is_empty_system(turn: Mapping[str, Any]) -> bool:
    """Whether this is an empty system turn, as datasets have it whose rows must all have the same form."""
    return _role(turn) == "system" and not is_full(_content(turn))


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    is_plain = turn.keys() == {"role", "content"} and turn["role"] in ("user", "assistant", "system")
    if is_plain and isinstance(content := turn["content"], str) and content.strip():  # most turns are
        content.encode()  # raises UnicodeError for a lone surrogate
        return {"role": turn["role"], "content": content}
    speaker = next((turn[name] for name in SPEAKERS if name in turn), None)
    if speaker is None:
        raise ValueError("a turn has no role")
    role = _role(turn)
    if role is None:
        raise ValueError(f"a turn has the unknown {'role' if 'role' in turn else 'speaker'} {speaker!r}")
    check_media(turn)
    content, thoughts, calls = _parts(_content(turn))
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        if str(speaker).lower() in ("function_call", "tool_call"):
            calls, message["content"] = from_json(content), ""
        message |= _answer_fields(turn, thoughts, calls)
    elif thoughts or calls:
        raise ValueError(f"a {role} turn has reasoning or tool calls")
    elif role == "tool":
        message |= {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
    elif role == "text" and turn.get("cut"):
        message["cut"] = True
    text = message["content"]
    if message.get("cut") and not is_full(text) and message.keys() <= {"role", "content", "cut"}:
        message["learn"] = False  # a server hides reasoning that was cut off, so that nothing of the answer is known
        return message
    has_more = role == "tool" or message.keys() & {"tool_calls", "reasoning_content", "sampled_ids"}
    if not isinstance(text, str) or not (text.strip() or has_more):
        raise ValueError("a turn is empty or is not text")
    written = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
    for part in (text, message.get("reasoning_content", ""), written):
        part.encode()
    return message


def _answer_fields(turn: Mapping[str, Any], thoughts: str, calls: Any) -> dict[str, Any]:
    """Returns the further fields of an assistant message.

    Args:
      thoughts, calls: reasoning and tool calls among the parts of its content.
    """
    fields: dict[str, Any] = {}
    if (reasoning := thoughts or _reasoning(turn)).strip():
        fields["reasoning_content"] = reasoning
    calls = calls or from_json(turn.get("tool_calls") or turn.get("function_call") or [])
    if parsed := _tool_calls(calls):
        fields["tool_calls"] = parsed
    if any(any(mark) if isinstance(mark, list) else mark for mark in cut_marks(_beside_content(turn))):
        fields["cut"] = True
    if not is_learnt(turn):
        fields["learn"] = False
    ids = turn.get("sampled_ids")
    if ids is not None:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError("sampled_ids is not a list of token ids")
        fields["sampled_ids"] = ids
    if isinstance(turn.get("sampled_hash"), str):
        fields["sampled_hash"] = turn["sampled_hash"]
    return fields


def _beside_content(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name not in (*_TEXTS, "tool_calls", "function_call")}


def _parts(content: Any) -> tuple[Any, str, list[Any]]:
    """Splits the content of a turn, which may be a list of parts as in chat APIs: (text, reasoning, calls)."""
    if not isinstance(content, list):
        return ("" if content is None else content), "", []
    if not all(isinstance(part, dict) for part in content):
        raise ValueError("a turn has parts of type ?, but only text is supported")
    texts, thoughts, calls = [], [], []
    for part in content:
        kind = part.get("type", "text")
        if kind == "tool_use":
            calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input") or {}})
        elif kind in _PART_TEXTS:
            (texts if _PART_TEXTS[kind] == "text" and kind != "reasoning" else thoughts).append(part[_PART_TEXTS[kind]])
        else:
            raise ValueError(f"a turn has parts of type {kind}, but only text is supported")
    return "".join(texts), "".join(thoughts), calls


def _reasoning(turn: Mapping[str, Any]) -> str:
    """Returns the reasoning of a turn; ValueError if its fields contradict one another."""
    texts = {
        name: _reasoning_text(turn[name])
        for name in NAMES["reasoning"]
        if is_full(turn.get(name)) and not is_switch(turn[name])
    }
    longest = max(texts.values(), key=len, default="")
    if other := next((name for name, text in texts.items() if not is_contained(text, [longest])), ""):
        raise ValueError(f"a turn has several fields of reasoning that differ: --data.columns ignore={other}")
    return longest


def _reasoning_text(value: Any) -> str:
    """Returns reasoning from a text, an object with a text, or a list of them (OpenRouter's "reasoning_details")."""
    if isinstance(value, list):
        return "".join(map(_reasoning_text, value))
    if isinstance(value, dict):
        kind = str(value.get("type", ""))
        if "encrypted" in kind or "redacted" in kind or "summary" in kind:
            raise ValueError(f"the reasoning is not what was sampled, but {kind}")
        value = next((value[name] for name in ("text", "content", "thinking", "reasoning") if name in value), None)
    if not isinstance(value, str):
        raise ValueError("the reasoning is not text")
    return value


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise ValueError("the tool calls are not a list")
    parsed = []
    for call in calls:
        call = from_json(call)
        function = call.get("function", call)
        arguments = function.get("arguments", function.get("parameters", {})) or {}
        if not isinstance(function.get("name"), str) or not isinstance(from_json(arguments), dict):
            raise ValueError("a tool call has no name, or its arguments are not an object")
        tree = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        parsed.append(({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | tree)
    return parsed
