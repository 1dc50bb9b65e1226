"""Checks what a dozen kinds of chats teach under a chat template, with an oracle that is independent of the renderer.

Every field of a chat begins and ends with marker words of its own. What is learnt must contain the markers of what the
target sampled (reasoning, content, names and arguments of calls) and no others, in order. Before it must stand what the
template itself renders as the prompt of this turn, and after it the end that the template writes there.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jeagle.config import DataConfig
from jeagle.data.chat.render import Rendered, Renderer
from jeagle.data.chat.templates import ConversationError, with_one_time
from jeagle.data.sources.conversations import Conversation

_MARKER = re.compile(r"zz[a-z]+\d+")
_THINKING = re.compile("think|thought|reason|analysis|inner", re.IGNORECASE)  # how templates name a block of reasoning
_OPENED = re.compile(r"[<\[](?!/)((?!end)[^<>\[\]])*think[^<>\[\]]*[>\]]\s*$", re.IGNORECASE)  # at a prompt's end
_TAGS = re.compile("</?think>")
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")  # names of a message's reasoning
_ESCAPED = re.compile(r"""'city'|\\"city""")  # arguments in Python's notation, or as JSON within JSON


class Outcome(NamedTuple):
    """What became of a chat: "right", "refused" or "WRONG", and why it is not right."""

    verdict: str
    reason: str = ""


def _field(name: str, number: int) -> str:
    return f"zz{name}{number} boats sail at dawn zz{name}end{number}"


def _user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": _field("user", number)}


def _answer(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": _field("answer", number)} | more


def _thought(number: int) -> dict[str, Any]:
    return {"reasoning_content": _field("thought", number)}


def _calls(*numbers: int, as_text: bool = False, **more: Any) -> dict[str, Any]:
    """Returns a turn that calls a tool for each number; the arguments are an object, or its JSON text.

    An id has nine characters, as Mistral's templates want it, and names the tool, because Kimi's show nothing else.
    """
    calls = []
    for number in numbers:
        arguments: Any = {"city": f"zzcity{number} of gulls", "day": f"zzday{number}"}
        function = {"name": f"zzlook{number}", "arguments": json.dumps(arguments) if as_text else arguments}
        calls.append({"id": f"zzlook{number}id", "type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": calls} | more


def _result(number: int) -> dict[str, Any]:
    content = json.dumps({"found": _field("result", number)})
    return {"role": "tool", "name": f"zzlook{number}", "tool_call_id": f"zzlook{number}id", "content": content}


def _tool(number: int) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": _field(name, 8)} for name in ("city", "day")}
    parameters = {"type": "object", "properties": properties, "required": ["city", "day"]}
    function = {"name": f"zzlook{number}", "description": _field("tool", number), "parameters": parameters}
    return {"type": "function", "function": function}


def _chat(*messages: dict[str, Any], thinking: bool | None = None) -> Conversation:
    tools = sorted({call["function"]["name"] for m in messages for call in m.get("tool_calls", ())})
    return Conversation("", messages, tuple(_tool(int(name[6:])) for name in tools), thinking=thinking)


_INLINE = f"<think>\n{_field('thought', 1)}\n</think>\n\n{_field('answer', 1)}"
_ODD = f"\n  {_field('answer', 1)}\t\n\n\n    {_field('answer', 2)} \u00a0é 東京 🙂 \n"
_SPELT = f"<think> </think> assistant: {_field('answer', 1)}\n\n{_field('user', 1)} \n"
CHATS: Mapping[str, Conversation] = MappingProxyType(
    {
        "one turn": _chat(_user(1), _answer(1)),
        "several turns": _chat(_user(1), _answer(1), _user(2), _answer(2), _user(3), _answer(3)),
        "with system": _chat({"role": "system", "content": _field("system", 1)}, _user(1), _answer(1)),
        "reasoning": _chat(_user(1), _answer(1, **_thought(1)), thinking=True),
        "reasoning inline": _chat(_user(1), _answer(0, content=_INLINE), thinking=True),
        "reasoning earlier": _chat(
            _user(1), _answer(1, **_thought(1)), _user(2), _answer(2, **_thought(2)), thinking=True
        ),
        "thinking off": _chat(_user(1), _answer(1), _user(2), _answer(2), thinking=False),
        "call": _chat(_user(1), _calls(1), _result(1), _answer(1), _user(2), _answer(2)),
        "several calls": _chat(_user(1), _calls(1, 2, as_text=True), _result(1), _result(2), _answer(1)),
        "agent loop": _chat(
            _user(1),
            _calls(1, **_thought(1)),
            _result(1),
            _calls(2, **_thought(2)),
            _result(2),
            _answer(3, **_thought(3)),
            thinking=True,
        ),
        "cut": _chat(_user(1), _answer(1), _user(2), _answer(2, cut=True)),
        "cut in thought": _chat(_user(1), _answer(1, content="", cut=True, **_thought(1)), thinking=True),
        "not learnt": _chat(_user(1), _answer(1, learn=False), _user(2), _answer(2)),
        "odd text": _chat({"role": "user", "content": _SPELT}, _answer(0, content=_ODD)),
    }
)


def check_template(tokenizer: Any, end_token_ids: Sequence[int]) -> dict[str, Outcome]:
    """Renders every kind of chat with the tokenizer's chat template.

    Args:
      end_token_ids: ids that may end an answer.

    Returns:
      the outcome of each kind of `CHATS`.
    """
    renderer, outcomes = Renderer(tokenizer, DataConfig(), end_token_ids), {}
    for kind, conversation in CHATS.items():
        try:
            [documents] = renderer([conversation])
        except ConversationError as error:
            documents = error
        except Exception as error:  # no chat may end the work, whatever the template does
            outcomes[kind] = Outcome("WRONG", f"{type(error).__name__}: {error}")
            continue
        outcomes[kind] = judge(tokenizer, end_token_ids, conversation, documents)
    return outcomes


def sample_texts(tokenizer: Any) -> list[str]:
    """Returns what the tokenizer's template writes for a chat with a system turn and for one with a call."""
    chats = [CHATS["with system"], CHATS["call"]]
    return [text for chat in chats for text in JudgedTurn(tokenizer, chat, len(chat.messages) - 1).texts(chat.messages)]


def judge(
    tokenizer: Any,
    end_token_ids: Sequence[int],
    conversation: Conversation,
    documents: Sequence[Rendered] | ConversationError,
) -> Outcome:
    """Judges the documents of a chat whose fields have markers, or the reason why there are none."""
    turns = [
        JudgedTurn(tokenizer, conversation, i)
        for i, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and message.get("learn", True)
    ]
    if isinstance(documents, ConversationError):
        if all(turn.is_plain() for turn in turns):
            return Outcome("WRONG", f"it is refused although the template renders it: {documents}")
        return Outcome("refused", str(documents))
    runs = [(document, *run) for document in documents for run in _runs(document.supervised)]
    if len(runs) != len(turns):
        return Outcome("WRONG", f"{len(runs)} spans are learnt in place of {len(turns)}")
    for turn, (document, first, last) in zip(turns, runs, strict=True):
        ids = document.ids.tolist()
        if fault := turn.fault(ids[:first], ids[first:last], frozenset(end_token_ids)):
            return Outcome("WRONG", f"message {turn.number}: {fault}")
    return Outcome("right")


def _runs(supervised: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.pad(supervised.astype(int), 1)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _markers(text: str) -> list[str]:
    """Returns the markers in a text, without those that repeat the name of a tool, as the id of a call does."""
    found = _MARKER.findall(text)
    return [marker for i, marker in enumerate(found) if "look" not in marker or marker not in found[:i]]


class JudgedTurn:
    """A turn that must be learnt, and all the ways in which the template may be asked to render it.

    A row that does not say with which thinking switch it was sampled, or that has arguments in a form that the
    template does not read, may be rendered in more than one way.
    """

    def __init__(self, tokenizer: Any, conversation: Conversation, number: int):
        self._tokenizer, self._conversation, self.number = tokenizer, conversation, number
        message = conversation.messages[number]
        functions = [call["function"] for call in message.get("tool_calls", ())]
        texts = [message.get("reasoning_content", ""), *_TAGS.split(message["content"])]
        for function in functions:
            texts += [function["name"], *_arguments(function["arguments"], as_text=False).values()]
        self._fields = [text.strip() for text in texts if text.strip()]
        self._markers = _markers(" ".join(self._fields))
        self._thinks, self._is_cut = "thought" in self._markers[0], bool(message.get("cut"))
        self._shown, following = conversation.messages[: number + 1], conversation.messages[number + 1 :]
        self._continued = (*self._shown, *(following or [_result(1) if functions else _user(9)]))
        self._endings = [self._shown, self._continued] if following else [self._shown]

    def fault(self, before: list[int], learnt: list[int], ends: frozenset[int]) -> str:
        """Returns what is wrong with the ids that are learnt for this turn after `before`, or an empty text."""
        if before not in map(self._ids, self._prompts()):
            return f"what stands before it is not the prompt of this turn: {self._tokenizer.decode(before)[-60:]!r}"
        text = self._tokenizer.decode(learnt)
        if _markers(text) != self._markers or not all(field in text for field in self._fields):
            return f"{text!r} is learnt in place of {self._fields}"
        if not self._thinks and _THINKING.search(text.partition(self._markers[0])[0]):
            return f"an empty block of reasoning is learnt: {text!r}"
        if _ESCAPED.search(text) and not all(map(_ESCAPED.search, self.texts(self._shown))):
            return f"the arguments of a call are quoted: {text!r}"
        tail = text.rpartition(self._fields[-1])[2]
        if self._is_cut:
            return f"the end of an answer that was cut off is learnt: {tail!r}" if tail.strip() else ""
        if not ends.isdisjoint(self._ids(tail)[:-1]):
            return f"what follows the end is learnt: {text!r}"
        if not any(found.startswith(tail) for found in self._tails(self._shown, self._continued)):
            return f"the template does not write {tail!r} after the answer"
        special, header = self._tokenizer.added_tokens_decoder.keys() | ends, self._header()
        shown = [self._ids(found) for found in self._tails(*self._endings) if found.strip() != header]
        if learnt[-1] not in special and not all(special.isdisjoint(found) for found in shown):
            return f"the end is not learnt: {text!r}"
        return ""

    def is_plain(self) -> bool:
        """Whether the template renders this turn after its prompt with all that was sampled and nothing else."""
        prompts = self._renderings(self._conversation.messages[: self.number], prompt=True)
        wholes = self._renderings(self._shown, prompt=False)
        for prompt, whole in zip(prompts, wholes, strict=True):
            if prompt is None or whole is None or not whole.startswith(prompt):
                continue
            if not self._thinks and _OPENED.search(prompt):
                continue
            text = whole[len(prompt) :]
            lead, tail = text.partition(self._markers[0])[0], text.rpartition(self._fields[-1])[2]
            empty_block = not self._thinks and _THINKING.search(lead)
            if _markers(text) == self._markers and not empty_block and (self._is_cut or tail.strip()):
                return True
        return False

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompts(self) -> list[str]:
        texts = self._renderings(self._conversation.messages[: self.number], prompt=True)
        return [text for text in texts if text is not None]

    def _header(self) -> str:
        """Returns the generation prompt, which some templates write behind every chat, even unasked."""
        prompt = next(iter(self._prompts()), "")
        return _MARKER.split(prompt)[-1].strip()

    def _tails(self, *conversations: Sequence[dict[str, Any]]) -> Iterator[str]:
        """Yields what the template writes after this turn in these conversations."""
        for messages in conversations:
            yield from (text.rpartition(self._fields[-1])[2] for text in self.texts(messages))

    def texts(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        """Returns what the template writes for these messages, in each way to ask it that it does not refuse."""
        return [text for text in self._renderings(messages, prompt=False) if text is not None]

    def _renderings(self, messages: Sequence[dict[str, Any]], *, prompt: bool) -> Iterator[str | None]:
        """Yields a text for each way to ask the template, or None where it refuses."""
        given, tools = self._conversation.thinking, list(self._conversation.tools) or None
        template = with_one_time(self._tokenizer.chat_template)
        for thinking, as_text, null in itertools.product(
            [False, True] if given is None else [given], *[[False, True]] * 2
        ):
            shown = [_shown(message, as_text, null) for message in messages]
            options = {
                "enable_thinking": thinking,
                "thinking": thinking,
                "add_generation_prompt": prompt,
            }
            try:
                yield self._tokenizer.apply_chat_template(
                    shown, tools=tools, chat_template=template, tokenize=False, **options
                )
            except Exception:  # a template refuses by any error of Jinja's
                yield None


def _shown(message: Mapping[str, Any], as_text: bool, null: bool) -> dict[str, Any]:
    """Returns a message as a server shows it to a template, with arguments as text and with null for no content."""
    shown = {name: value for name, value in message.items() if name not in ("cut", "learn")}
    if "reasoning_content" in shown:
        shown |= dict.fromkeys(_REASONING, shown["reasoning_content"])
    if "tool_calls" in shown:
        shown["content"] = shown["content"] or (None if null else "")
        shown["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _arguments(call["function"]["arguments"], as_text)}}
            for call in shown["tool_calls"]
        ]
    return shown


def _arguments(arguments: Any, as_text: bool) -> Any:
    tree = json.loads(arguments) if isinstance(arguments, str) else arguments
    return json.dumps(tree) if as_text else tree
