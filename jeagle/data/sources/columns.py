"""Recognises which columns of a row hold its conversation.

A column that could change what the answers were sampled behind is used, or the row is refused by that column's name and
the flag that decides. Every other column is reported by `unused`, so that nothing is left out in silence.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jeagle.data.sources.marks import is_cut_mark
from jeagle.errors import UserError

# What a column may hold -> the names that are recognised, the preferred ones first.
NAMES = {
    "chat": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "trajectory", "data"),
    "prompt": ("prompt", "instruction", "question", "query", "problem", "input", "user"),
    "answer": (
        *("response", "completion", "output", "solution", "generated_solution", "answer", "generation", "assistant"),
        *("answers", "choices"),
    ),
    "context": ("input", "context"),
    "history": ("history",),
    "reasoning": ("reasoning_content", "reasoning", "thinking", "reasoning_details"),
    "system": ("system", "system_prompt", "system_message"),
    "text": ("text",),
    "ids": ("input_ids", "token_ids"),
    "mask": ("loss_mask", "labels", "assistant_masks", "assistant_mask", "completion_mask"),
}
# Columns beside a conversation that may be parts of the prompt, which only the user knows.
_CONTEXTS = (
    *("context", "contexts", "passage", "passages", "document", "documents", "article", "background", "evidence"),
    *("choices", "options", "sql_context", "schema", "premise", "hypothesis", "history", "input"),
)
_MEDIA = ("image", "img", "video", "audio", "pixel")
TOOLS = ("tools", "functions", "tools_json")
MODELS = ("model", "generator", "model_name")
# Turn by turn, 1 for an answer that is learnt.
LEARN_LISTS = ("loss_mask", "loss_masks", "weights", "train_mask")
_LEAST = 12  # characters of a value below which another text contains it by chance
_SWITCHES = {True: True, False: False, "on": True, "off": False}
_OWN = ("enable_thinking", "chat_template_kwargs", "sampled_with")  # read elsewhere


class Columns(NamedTuple):
    """The columns of a row that hold its conversation.

    Attributes:
      chat: a list of turns.
      prompt, answer: a prompt and its answer.
      context: texts that are appended to the first user's turn (Alpaca's "input").
      history: the turns before the prompt.
      reasoning, system: the reasoning of the answer, and the system prompt.
      text: plain text.
      ids, mask: token ids, and which of them are supervised.
      ignore: columns of a row, or fields of its turns, that are not looked at.
    """

    chat: str = ""
    prompt: str = ""
    context: tuple[str, ...] = ()
    answer: str = ""
    history: str = ""
    reasoning: str = ""
    system: str = ""
    text: str = ""
    ids: str = ""
    mask: str = ""
    ignore: tuple[str, ...] = ()

    def main(self) -> tuple[str, ...]:
        """Returns the columns without which there is no conversation."""
        return tuple(filter(None, (self.chat, self.prompt, self.answer, self.text, self.ids, self.mask)))

    @functools.lru_cache(maxsize=256)  # noqa: B019 (a few columns, once for each row)
    def used(self) -> tuple[str, ...]:
        """Returns all columns that are used."""
        return tuple(name for field in self[:-1] for name in ((field,) if isinstance(field, str) else field) if name)

    def __str__(self) -> str:
        names = self.used()
        return ("column " if len(names) == 1 else "columns ") + " and ".join(map(plain_name, names))


NO_COLUMNS = Columns()


def parse_columns(text: str) -> Columns:
    """Parses --data.columns, such as `prompt=question,context=passage,ignore=image`; an empty text gives no columns.

    Raises:
      UserError: if a part is not NAME=COLUMN with a known name, or if the parts contradict one another.
    """
    fields: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, column = (piece.strip() for piece in part.partition("="))
        if name not in Columns._fields or not column or (name in fields and name not in ("context", "ignore")):
            raise UserError(
                f"--data.columns {text!r} cannot be read at {part!r}: write NAME=COLUMN once for each NAME of "
                f"{', '.join(Columns._fields)} (context and ignore may be given several times)."
            )
        fields[name] = (*fields.get(name, ()), column) if name in ("context", "ignore") else column
    columns = Columns(**fields)
    forms = [columns.chat, columns.prompt or columns.answer, columns.text, columns.ids or columns.mask]
    if len(list(filter(None, forms))) > 1 or bool(columns.ids) != bool(columns.mask):
        raise UserError(
            f"--data.columns {text!r} contradicts itself: give one of chat, prompt with answer, text, or ids with mask."
        )
    return columns


def find_columns(row: Mapping[str, Any], given: Columns = NO_COLUMNS, *, answered: bool = True) -> Columns:
    """Returns the columns that hold the row's conversation.

    Args:
      given: the columns that the user names. A row without one of them is refused.
      answered: whether the row must have an answer, and not a prompt alone.

    Raises:
      ValueError: if the row has no such columns, or if one of its columns needs a decision of the user.
    """
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object: write one conversation per line")
    there = {name: value for name, value in row.items() if value is not None and name not in given.ignore}
    if missing := [name for name in given.main() if name not in there]:
        raise ValueError(f"the row has no column {plain_name(missing[0])}, which --data.columns names")
    main = given if given.main() else _recognised(there, answered)
    if main.prompt and not main.answer and answered:
        main = main._replace(answer=_first(there, "answer", main.used()))
    elif main.answer and not main.prompt:
        main = main._replace(prompt=_first(there, "prompt", main.used()))
    if bool(main.prompt) != bool(main.answer) and (answered or not main.prompt):
        raise ValueError(_unrecognised(there))
    columns = main._replace(ignore=given.ignore)
    if not (columns.text or columns.ids):
        columns = _with_more(there, columns, given)
    _check_decided(there, columns, given, answered)
    return columns


def unused(row: Mapping[str, Any], columns: Columns, messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the columns with content that is not used, except those whose text the messages contain anyway."""
    texts = [message[name] for message in messages for name in ("content", "reasoning_content") if name in message]
    known = {*columns.used(), *columns.ignore, *_OWN, *(["attention_mask"] if columns.ids else [])}
    known |= {name for name in LEARN_LISTS if isinstance(row.get(name), list) and not columns.ids}
    known |= {next((name for name in names if is_full(row.get(name))), "") for names in (TOOLS, MODELS)}
    return [
        plain_name(name)
        for name, value in row.items()
        if not (name in known or is_cut_mark(name) or (is_switch(value) and name in NAMES["reasoning"]))
        and not (is_choices(value) and all(is_contained(_all_text(choice), texts) for choice in value))
        and is_full(value)
        and not is_contained(value, texts, least=_LEAST)
    ]


def thinking_of(row: Mapping[str, Any]) -> bool | None:
    """Returns the thinking switch that the row states, or None."""
    nested = row.get("chat_template_kwargs")
    for fields in (row, nested if isinstance(nested, dict) else {}):
        for name in ("enable_thinking", "thinking", "reasoning"):
            if is_switch(fields.get(name)):
                return _SWITCHES[fields[name]]
    return None


def is_switch(value: Any) -> bool:
    """Whether a value of a column named thinking or reasoning is a switch, and not reasoning."""
    return isinstance(value, bool | str) and value in _SWITCHES


def plain_name(name: Any) -> str:
    """Returns a name that is safe to print."""
    return name if isinstance(name, str) and name.isprintable() and len(name) < 80 else ascii(name)[:80]


def _recognised(row: Mapping[str, Any], answered: bool) -> Columns:
    ids, mask = (_first(row, kind) for kind in ("ids", "mask"))
    if ids and mask and isinstance(row[mask], list):
        return Columns(ids=ids, mask=mask)
    chats = [name for name in NAMES["chat"] if name in row]
    if chats and chats[0] != "data":
        return Columns(chat=chats[0])
    prompt = _first(row, "prompt")
    answer = _first(row, "answer", (prompt,)) if answered else ""
    if prompt and (answer or not answered):
        return Columns(prompt=prompt, answer=answer)
    if chats and isinstance(row["data"], list) and all(isinstance(text, str) for text in row["data"]):
        return Columns(chat="data")
    if "text" in row and not ids and prompt in ("", "user"):  # otherwise the text may hold a prompt, too
        return Columns(text="text")
    raise ValueError(_unrecognised(row))


def _unrecognised(row: Mapping[str, Any]) -> str:
    names = [plain_name(name) for name in row][:8]
    return (
        "the row has no messages, no conversations, no prompt with a response, and no text that is recognised: "
        f"--data.columns names its columns, such as prompt=COLUMN,answer=COLUMN (it has {', '.join(names) or 'none'})"
    )


def _with_more(row: Mapping[str, Any], columns: Columns, given: Columns) -> Columns:
    """Adds the columns beside a chat or a prompt: those that the user names, or those that are recognised."""
    found: dict[str, Any] = {}
    for kind in ("history", "reasoning", "system"):
        own = "" if kind == "history" and columns.chat else _first(row, kind, columns.used(), full=True)
        name = getattr(given, kind) or own
        found[kind] = name if name in row else ""
    names = given.context or (NAMES["context"] if columns.prompt else ())
    found["context"] = tuple(n for n in names if n not in columns.used() and is_full(row.get(n)))
    return columns._replace(**found)


def _check_decided(row: Mapping[str, Any], columns: Columns, given: Columns, answered: bool) -> None:
    """Raises a ValueError if the row has a column that only the user can judge."""
    used = columns.used()
    rest = {name: value for name, value in row.items() if name not in used and is_full(value)}
    check_media(rest)
    if columns.text or columns.ids:
        return
    kinds = ["system"] if given.context else ["context", "system"]
    kinds += ["reasoning"] if answered else []
    kinds += (["chat"] if not given.chat else []) if columns.chat else [] if given.prompt else ["prompt"]
    kinds += ["answer"] if answered and not (columns.chat or given.answer) else []
    doubtful: dict[str, str] = {}
    for kind in kinds:
        for name in rest.keys() & {*(_CONTEXTS if kind == "context" else NAMES[kind])}:
            doubtful.setdefault(name, kind)
    if columns.chat:  # a prompt beside turns is one of them, or tells what they came from
        doubtful.pop("input", None)
    texts = [_all_text(row[name]) for name in used] if doubtful else []
    for name, kind in doubtful.items():
        decided = name == "user" or (name == "answer" and columns.answer == "solution")  # NuminaMath's bare result
        decided |= is_switch(rest[name]) or is_choices(rest[name]) or _all_text(rest[name]) in texts
        if not decided and not is_contained(rest[name], texts, least=_LEAST * (kind == "context")):
            flag = "context" if kind == "prompt" else kind
            raise ValueError(
                f"the column {name} may belong to the conversation beside the {columns}: decide with --data.columns "
                f"{flag}={name} or ignore={name}"
            )


def _all_text(value: Any) -> str:
    """Returns the text of a value: of turns and choices in any form their texts alone, of anything else its JSON."""
    if isinstance(value, dict) and ("message" in value or "text" in value):
        value = (value.get("message") or value).get("content", value.get("text")) or ""
    if isinstance(value, str):
        return value
    turns = value if isinstance(value, list) else []
    texts = [turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn for turn in turns]
    if texts and all(isinstance(text, str) for text in texts):
        return "\n".join(map(str, texts))
    return json.dumps(value, ensure_ascii=False, default=str)


def check_media(fields: Mapping[str, Any]) -> None:
    """Raises a ValueError if one of the fields of a row or a turn holds images, video or audio."""
    for name, value in fields.items():
        kind = name.lower().partition("_")[0].rstrip("s") if isinstance(name, str) else ""
        if kind in _MEDIA and is_full(value) and not isinstance(value, bool | int | float):
            raise ValueError(
                f"the column {plain_name(name)} holds what the target does not see: --data.columns "
                f"ignore={plain_name(name)} learns the text alone"
            )


def is_choices(value: Any) -> bool:
    """Whether a value is the list of answers in the reply of an OpenAI-compatible server."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(c, dict) and ({"message", "finish_reason"} & c.keys()) for c in value)
    )


def _first(row: Mapping[str, Any], kind: str, taken: Sequence[str] = (), *, full: bool = False) -> str:
    """Returns the first recognised name of a kind that the row has, or an empty text."""
    names = [name for name in NAMES[kind] if name in row and name not in taken]
    if kind == "reasoning":
        names = [name for name in names if not is_switch(row[name])]
    if kind == "prompt":  # Alpaca's instruction may be empty, and its input the prompt
        names.sort(key=lambda name: not is_full(row[name]))
    if kind == "answer":  # of several answers the one that contains all others, such as the code in its explanation
        names = [name for name in names if name != "choices" or is_choices(row[name])]
        texts = [row[name] for name in names if is_full(row[name])]
        whole = [n for n in names if isinstance(row[n], str) and all(is_contained(text, [row[n]]) for text in texts)]
        names = [n for n in whole if is_full(row[n])] or [n for n in names if is_full(row[n])] or names
    return next((name for name in names if not full or is_full(row[name])), "")


def is_full(value: Any) -> bool:
    """Whether a value has content: a text with more than white space, or anything but null, [] and {}."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def is_contained(value: Any, texts: Sequence[Any], *, least: int = 0) -> bool:
    """Whether one of the texts is the value or contains it, as it is or as JSON writes it.

    Args:
      least: characters that a value must have to count as contained, because shorter ones occur by chance.
    """
    if not isinstance(value, str):
        return False
    value, texts = value.strip(), [text for text in texts if isinstance(text, str)]
    if len(value) < least:
        return any(value == text.strip() for text in texts)
    if any(value in text for text in texts):
        return True
    written = json.dumps(value, ensure_ascii=False)[1:-1]
    return written != value and any(written in text for text in texts)
