"""Reading conversations and prompts; setting some aside to measure on."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jeagle.data.starter import starter_prompts
from jeagle.errors import UserError

BAD_SHARE = 0.01  # more than this share of unreadable lines stops the reading
_SHAREGPT_ROLES = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"
)
# What changes the rendered text but is not rendered: training on the rest would teach what no server shows.
_NOT_RENDERED = ("tools", "tool_calls", "reasoning_content")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages of one chat.

    Attributes:
      id: 16 hex digits of the messages' sha256.
      messages: {"role", "content"} each.
      truncated: the last answer was cut off by a length limit.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    truncated: bool = False


@dataclasses.dataclass
class Reading:
    """What was read, and what was set aside: {reason: ["file:line", ...]}."""

    conversations: list[Conversation]
    lines: int = 0
    duplicates: int = 0
    aside: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def set_aside(self, reason: str, where: str) -> None:
        self.aside.setdefault(reason, []).append(where)

    def check(self) -> None:
        """UserError if too much was set aside, with the reasons."""
        bad = sum(map(len, self.aside.values()))
        if bad > BAD_SHARE * max(self.lines, 1):
            reasons = "; ".join(f"{reason} ({len(w)} times, first {w[0]})" for reason, w in self.aside.items())
            raise UserError(f"{bad} of {self.lines} conversations cannot be used: {reasons}. Mend or remove them.")


def starter_answers() -> Path:
    """The file of the starter prompts' answers that comes with jeagle."""
    return Path(str(resources.files("jeagle.data.starter") / "answers.jsonl.gz"))


def read_conversations(source: str) -> Reading:
    """Conversations of a jsonl or jsonl.gz file, or of `starter`.

    Lines are {"messages": [{"role", "content"}]} or ShareGPT's {"conversations": [{"from", "value"}]}.

    Raises:
      UserError: when the file is missing or over 1 % of its lines cannot be used.
    """
    if not source:
        raise UserError("--data.source is empty: give a .jsonl or .jsonl.gz file of conversations, or `starter`.")
    path = starter_answers() if source == "starter" else Path(source)
    reading, seen = Reading([]), set()
    for where, text in _lines(path):
        reading.lines += 1
        try:
            conversation = _parse(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reading.set_aside(_reason(error), where)
            continue
        if conversation.id in seen:
            reading.duplicates += 1
            continue
        seen.add(conversation.id)
        reading.conversations.append(conversation)
    reading.check()
    if not reading.conversations:
        raise UserError(f"{path} holds no conversations: give a jsonl file with messages on each line.")
    return reading


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a jsonl or jsonl.gz file, as they stand."""
    return [json.loads(text) for _, text in _lines(path)]


def read_prompts(source: str) -> list[dict[str, Any]]:
    """Prompts as {"id", "category", "messages"} from `starter` or a jsonl file of {"turns"} or {"messages"} lines.

    Of a conversation only the turns up to the first answer are taken. UserError names the line that cannot be read.
    """
    if source == "starter":
        return [
            {"id": p.id, "category": p.category, "messages": [{"role": "user", "content": p.text}]}
            for p in starter_prompts()
        ]
    prompts = []
    for where, text in _lines(Path(source)):
        try:
            tree = json.loads(text)
            messages = [{"role": "user", "content": tree["turns"][0]}] if "turns" in tree else _messages(tree)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f'{where} is no prompt ({_reason(error)}): write {{"turns": ["..."]}}.') from error
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        if first == 0:
            raise UserError(f"{where} begins with an answer: a prompt needs a user turn.")
        digest = hashlib.sha256(_canonical(messages[:first])).hexdigest()[:12]
        prompts.append({"id": digest, "category": str(tree.get("category", "")), "messages": messages[:first]})
    if not prompts:
        raise UserError(f'{source} holds no prompts: write {{"turns": ["..."]}} on each line.')
    return list({p["id"]: p for p in prompts}.values())


def split_held_out(
    conversations: Iterable[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """-> (training, held out), by a hash of the user's turns: one prompt never stands on both sides."""
    training, held_out = [], []
    for conversation in conversations:
        turns = [m["content"] for m in conversation.messages if m["role"] == "user"]
        number = int(hashlib.sha256(_canonical(turns)).hexdigest()[:13], 16) / 16**13
        (held_out if number < share else training).append(conversation)
    return training, held_out


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", line) as bytes, so that one line that is no UTF-8 is one bad line and not a bad file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: give a .jsonl or .jsonl.gz file of conversations.")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): make it again.") from error


def _parse(text: bytes) -> Conversation:
    tree = json.loads(text)
    messages = _messages(tree)
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no answer in it")
    truncated = tree.get("finish_reason") == "length"
    return Conversation(hashlib.sha256(_canonical(messages)).hexdigest()[:16], tuple(messages), truncated)


def _messages(tree: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(tree, dict):
        raise ValueError("no JSON object: write one conversation a line")
    turns = tree.get("messages", tree.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("neither messages nor conversations in it")
    if lost := [field for field in _NOT_RENDERED if tree.get(field) or any(turn.get(field) for turn in turns)]:
        raise ValueError(f"{' and '.join(lost)} in it, which jeagle does not render")
    messages = [_message(turn) for turn in turns]
    for message in messages:
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"a role {message['role']!r}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError("an empty turn, or one that is no text")
    return messages


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    if "role" in turn:
        return {"role": turn["role"], "content": turn["content"]}
    if turn["from"] not in _SHAREGPT_ROLES:
        raise ValueError(f"a speaker {turn['from']!r}")
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _canonical(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return "no JSON"
    if isinstance(error, UnicodeError):
        return "text that is no Unicode"
    return f"{error} missing" if isinstance(error, KeyError) else str(error)
