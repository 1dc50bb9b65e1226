"""The form of a chat template's answers: what the target samples before, between and after their parts.

The form is found by rendering a few chats whose fields are known marks. With it, the text that a target samples can be
written where the template shows another one: templates drop the reasoning of earlier answers, and their generation
prompts open a reasoning block, or contain an empty one that is not shown later.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jeagle.data.chat.templates import (
    PROBE_CALL,
    PROBE_TOOL,
    PROBE_VALUE,
    ChatTemplate,
    ConversationError,
    RenderRequest,
)

Message = Mapping[str, Any]
THINK = ("<think>", "</think>")
_QUESTION, _ANSWER, _REASONING = "jeaglequestion", "jeagleanswer", "jeaglereasoning"
_NEXT, _RESULT = "jeaglenext", "jeagleresult"
_USER, _PLAIN = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
_TOOL = {"role": "tool", "name": "jeaglecall", "tool_call_id": "jeaglecal", "content": _RESULT}
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"
# Tags of reasoning that a template may mention, or write into its prompts, without ever writing reasoning itself.
_PAIRS = (THINK, ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))


class Ending(NamedTuple):
    """How answers of one kind end.

    Attributes:
      text: the end token, and for an answer without calls all that the template writes between its text and the end
        token; empty if nothing of its own ends an answer.
      after: number of characters that the template writes after it if the chat ends there.
      by_next: role of the next message -> the text that ends the answer, which the template writes only where this
        message follows; "" stands for every role.
    """

    text: str = ""
    after: int = 0
    by_next: Mapping[str, str] = MappingProxyType({})


class AnswerForm:
    """The form of the answers of a chat template.

    Args:
      added: the tokenizer's added tokens by id.
      end_token_ids: ids that end an answer by the target's configuration.

    Attributes:
      open, close: what the target samples before and after its reasoning; empty if the template knows no reasoning.
      opens: whether the generation prompt opens a reasoning block where thinking is on.
      lead: what the target samples immediately before the text of an answer.
      opening: the special tokens, with the text between them, that open an answer; empty if there are none.
      is_simple: thinking switch -> whether a plain answer stands as it is behind its generation prompt.
    """

    def __init__(
        self, template: ChatTemplate, added: Mapping[int, Any], end_token_ids: Sequence[int], *, tools: bool = False
    ):
        self._template, self._tools = template, tools
        self._added = {token.content: token for token in added.values()}
        self._ends = {added[i].content for i in end_token_ids if i in added}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._prompts = {on: self._render(_USER, thinking=on, prompt=True) for on in (False, True)}
        self._answers = {on: self._render(_USER, _PLAIN, thinking=on) for on in (False, True)}
        # What generation prompts have beyond the beginning of the answers that the template shows, and what the
        # template shows there instead.
        self._extras = {on: self._beyond(self._prompts[on], self._answers[on]) for on in (False, True)}
        self._heads = {on: self._head(on) for on in (False, True)}
        self.open, self.close = self._reasoning_marks()
        self.opens = self._is_open(self._prompts[True])
        on = not self._prompts[False]
        beyond = self._extras[on].replace(self.open.strip(), "").replace(self.close.strip(), "")
        self.lead = "" if beyond.strip() else self._without_empty_block(self._heads[on])
        self.close = self.close.removesuffix(self.lead)
        self.is_simple = {on: self._shows_plainly(on) for on in (False, True)}
        self.opening = self._find_opening()
        self._endings = {(calls, on): self._find_ending(calls, on) for calls in (False, True) for on in (False, True)}

    def ending(self, message: Message, next_role: str, *, thinking: bool) -> str:
        """Returns the text that ends an answer; empty if it was cut off, or if only a further turn would end it.

        Raises:
          ConversationError: if no end token ever follows such an answer.
        """
        ending = self._ending(message, thinking)
        if message.get("cut"):
            return ""
        if not (ending.text or ending.by_next):
            raise ConversationError(self._why_endless())
        if ending.text:
            return ending.text
        by_next = {**self._endings[True, thinking].by_next, **self._endings[False, thinking].by_next}
        return by_next.get(next_role, by_next.get("", ""))

    def _ending(self, message: Message, thinking: bool) -> Ending:
        return self._endings[bool(message.get("tool_calls")), thinking]

    def with_fields(self, message: dict[str, Any], thinking: bool | None = None) -> dict[str, Any]:
        """Returns an answer whose reasoning is in a field of its own, if its text has the marks of reasoning.

        Args:
          thinking: the thinking switch that the answer was sampled with, if that is known.

        Raises:
          ConversationError: if the answer was not cut off and never closes its reasoning.
        """
        content = message["content"]
        if message["role"] != "assistant" or not content or message.get("reasoning_content"):
            return message
        marks = [(self.open.strip(), self.close.strip()), THINK] if self.open else []
        for begin, end in marks:
            if (parts := split_reasoning(content, begin, end)) is not None:
                reasoning, text = parts
                return _with(message, reasoning, self._without_marks(text))
            if content.lstrip().startswith(begin):
                if not message.get("cut"):
                    raise ConversationError(
                        "an answer never closes its reasoning, and nothing says that it was cut off"
                    )
                return _with(message, content.partition(begin)[2].removeprefix(self.open.partition(begin)[2]), "")
        if message.get("cut") and thinking and self.opens and not message.get("tool_calls"):
            return _with(message, content, "")  # the prompt had opened the reasoning, and nothing closes it
        text = self._without_marks(content)
        return message if text == content else message | {"content": text}

    def sampled(self, prompt: str, shown: str, message: Message, previous: str, *, thinking: bool) -> str:
        """Returns what the target samples for an answer behind its prompt, without the end.

        Args:
          prompt: what the template writes before the answer, generation prompt included.
          shown: what it writes for the chat that ends with the answer.
          message: the answer, as `with_fields` returns it.
          previous: the text of the message before it.
          thinking: the thinking switch of both texts.

        Raises:
          ConversationError: if the template shows something else than the answer, or if its prompt does not lead to it.
        """
        reasoning, calls = message.get("reasoning_content", "").strip(), message.get("tool_calls", ())
        self._check_prompt(prompt, bool(reasoning), thinking)
        opened = "" if self._is_open(prompt) else self.open
        if message.get("cut") and reasoning and not (calls or message["content"].strip()):
            return opened + message["reasoning_content"].lstrip()
        body = self._body(prompt, shown, message, previous.strip(), self._ending(message, thinking))
        rest = self._without_empty_block(body)
        if reasoning:
            text = opened + reasoning + self.close + rest
            block = (
                rf"\s*(?:{re.escape(self.open.strip())})?\s*({re.escape(reasoning)}\s*{re.escape(self.close.strip())})"
            )
            if found := re.match(block, body):
                text = body if shown.startswith(prompt) else opened + body[found.start(1) :]
        elif len(rest) < len(body):
            reason = "the template puts an empty reasoning block into the answer, which the target does not sample"
            raise ConversationError(reason + self._advice(thinking))
        else:
            text = body
        self._check(text, opened, reasoning, message)
        return text

    def _check_prompt(self, prompt: str, reasons: bool, thinking: bool) -> None:
        """Checks that a prompt opens a reasoning block, or has a closed one, only where the answer agrees with it."""
        if reasons and not self.open:
            raise ConversationError("the template does not write the reasoning: --data.reasoning drop removes it")
        if not reasons and self._is_open(prompt):
            reason = "the generation prompt opens a reasoning block that the answer does not have"
            raise ConversationError(reason + self._advice(thinking))
        if reasons and self._is_closed(prompt):
            remedy = "--data.reasoning drop removes it" if thinking else "use --data.thinking on"
            raise ConversationError(f"the generation prompt rules out the reasoning that the answer has: {remedy}")

    def _body(self, prompt: str, shown: str, message: Message, previous: str, ending: Ending) -> str:
        """Returns what the template shows of an answer behind its prompt, apart from the end."""
        calls, begin = message.get("tool_calls", ()), self._behind(prompt, shown, previous)
        if missing := [name for call in calls if (name := call["function"]["name"]) not in shown]:
            raise ConversationError(f"the template does not write tool calls ({missing[0]})")
        if begin is None and calls:
            raise ConversationError("the chat template renders a tool call differently than its generation prompt")
        if begin is None:
            return self.lead + message["content"].strip()
        body = shown[begin : len(shown) - ending.after]
        if not body.endswith(ending.text):
            raise ConversationError(self._why_endless())
        body = body.removesuffix(ending.text)
        if shown.startswith(prompt):
            return body
        heads = [head for head in self._heads.values() if head.strip() and body.startswith(head)]
        return self.lead + body.removeprefix(heads[0]) if heads else body.lstrip()

    def _behind(self, prompt: str, shown: str, previous: str) -> int | None:
        """Returns where an answer begins in the chat that ends with it, or None if that is not known.

        The prompt may have more at its end than the chat, and the history may change once it is answered. Then the
        answer begins behind the last message before it.
        """
        extras = [extra for extra in {"": "", **self._extras}.values() if prompt.endswith(extra)]
        bases = [prompt.removesuffix(extra) for extra in sorted(extras, key=len)]
        if (base := next((base for base in bases if shown.startswith(base)), None)) is not None:
            return len(base)
        tails = [base[base.rfind(previous) :] for base in bases if previous and previous in base]
        return next((place + len(tail) for tail in tails if (place := shown.rfind(tail)) >= 0), None)

    def _check(self, text: str, opened: str, reasoning: str, message: Message) -> None:
        """Checks that a text has all parts of an answer, and apart from its calls nothing else."""
        content, place = message["content"].strip(), 0
        for call in message.get("tool_calls", ()):
            place = text.find(call["function"]["name"], place) + 1
            if not place:
                raise ConversationError(f"the template does not write tool calls ({call['function']['name']})")
        if reasoning not in text:
            raise ConversationError("the template does not write the reasoning: --data.reasoning drop removes it")
        wanted = (opened + reasoning + self.close if reasoning else "") + self.lead + content
        if content not in text or not (place or "".join(text.split()) == "".join(wanted.split())):
            raise ConversationError("the template puts text other than the answer before the end token")

    def _advice(self, thinking: bool) -> str:
        if thinking and self.is_simple[False]:
            return ": use --data.thinking off"
        return ": give answers with reasoning, such as the target's own (python -m jeagle.regenerate)"

    def _is_open(self, prompt: str) -> bool:
        return bool(self.open) and prompt.rstrip().endswith(self.open.strip())

    def _is_closed(self, prompt: str) -> bool:
        """Whether a prompt contains a reasoning block, open or not, that it closes."""
        end = self.close.strip()
        return prompt.rstrip().endswith(end) and not self._prompts[True].rstrip().endswith(end)

    def _without_empty_block(self, text: str) -> str:
        """Returns a text without the empty reasoning block at its beginning, whose first tag the prompt may have."""
        begin, end = map(str.strip, (self.open, self.close) if self.open else THINK)
        if found := re.match(rf"\s*(?:{re.escape(begin)})?\s*{re.escape(end)}", text):
            return text[found.end() :].removeprefix(self.close[len(self.close.rstrip()) :])
        return text

    def _without_marks(self, text: str) -> str:
        """Returns the text of an answer without the special tokens that stand around it."""
        lead, end = self.lead.strip(), self._endings[False, False].text.strip()
        if self._tokens.search(lead) and text.lstrip().startswith(lead):
            text = text.lstrip().removeprefix(lead)
        return text.removesuffix(end) if end else text

    def _render(
        self, *messages: dict[str, Any], thinking: bool = False, prompt: bool = False, tools: bool = False
    ) -> str:
        """Renders a chat of marks with tools or without them, as the template allows; empty if it refuses the chat."""
        shown = self._template.shown(messages)
        for offered in ((PROBE_TOOL,), ()) if tools or self._tools else ((), (PROBE_TOOL,)):
            [text] = self._template.texts([RenderRequest(shown, offered, thinking, prompt)])
            if isinstance(text, str):
                return text
        return ""

    def _beyond(self, prompt: str, shown: str) -> str:
        """Returns the end of a prompt from where another text differs from it, in whole tokens and tags."""
        if not shown or shown.startswith(prompt):
            return ""
        common = _common_length(prompt, shown)
        tokens = [*self._tokens.finditer(prompt), *re.finditer(_TAG, prompt)]
        return prompt[min([common, *(t.start() for t in tokens if t.start() < common < t.end())]) :]

    def _reasoning_marks(self) -> tuple[str, str]:
        """Returns what stands before the reasoning, and between it and the rest, `lead` included."""
        reasoning = {"reasoning_content": _REASONING}
        calls = PROBE_CALL | reasoning
        for message, tools in ((_PLAIN | reasoning, False), (calls | {"content": _ANSWER}, True), (calls, True)):
            text = self._render(_USER, message, thinking=True, tools=tools)
            before, found, after = text.partition(_REASONING)
            between, answered, _ = after.partition(_ANSWER)
            if not answered:  # the calls follow, as they stand without reasoning
                bare = self._render(_USER, PROBE_CALL, thinking=True, tools=True)
                stop = max(1, len(after) - _common_length(after[::-1], bare[::-1]))
                stop = max([stop, *(t.end() for t in re.finditer(_TAG, after) if t.start() < stop < t.end())])
                between = after[:stop]
            if not found or PROBE_CALL["tool_calls"][0]["function"]["name"] in between:
                continue
            prompt = self._render(_USER, thinking=True, prompt=True, tools=tools)
            base = prompt if before.startswith(prompt) else prompt.removesuffix(self._extras[True])
            opened = before.removeprefix(base) if before.startswith(base) else ""
            if not opened.strip():  # the prompt has opened the block
                tag = re.search(rf"(?:{_TAG})\s*$", before)
                extra = self._extras[True]
                opened = extra if extra.strip() else tag[0] if tag else opened
            return opened, between
        return self._unseen_marks()

    def _unseen_marks(self) -> tuple[str, str]:
        """Returns the marks of reasoning, by its prompts and the tags it mentions, of a template that writes none."""
        for begin, end in _PAIRS:
            if begin not in self._template.source and end not in self._template.source:
                continue
            for text in (*self._prompts.values(), self._answers[False]):
                if block := re.search(rf"{re.escape(begin)}(\s*)(?:{re.escape(end)}(\s*)(?:$|{_ANSWER})|$)", text):
                    line = "\n" if "\n" in block[1] else ""
                    return begin + line, line + end + (line * 2 if block[2] is None else block[2])
            line = "\n" if begin == THINK[0] else ""  # the most common form
            return begin + line, line + end + line * 2
        return "", ""

    def _head(self, on: bool) -> str:
        """Returns what the template shows of a plain answer before its text, behind what its prompt begins with."""
        base, shown = self._prompts[on].removesuffix(self._extras[on]), self._answers[on]
        return shown[len(base) :].partition(_ANSWER)[0] if base and shown.startswith(base) else ""

    def _shows_plainly(self, on: bool) -> bool:
        prompt, shown = self._prompts[on], self._answers[on]
        return bool(prompt) and shown.startswith(prompt + self.lead + _ANSWER) and not self._is_open(prompt)

    def _find_opening(self) -> str:
        prompt, question = self._prompts[False] or self._prompts[True], self._render(_USER)
        has_header = question and prompt.startswith(question) and prompt != question
        added = prompt.removeprefix(question) if has_header else prompt.rpartition(_QUESTION)[2]
        for mark in (self.open.strip(), self.close.strip()):
            added = added.partition(mark)[0] if mark else added
        while ended := next((end for end in self._ends if added.strip().startswith(end)), ""):
            added = added.strip().removeprefix(ended)
        line = added.strip().partition("\n")[0]
        return line if self._tokens.search(line) else ""

    def _find_ending(self, calls: bool, on: bool) -> Ending:
        """Finds how answers end from a chat that ends with one, and from one that goes on with another message."""
        mark, next_mark = (PROBE_VALUE, _RESULT) if calls else (_ANSWER, _NEXT)
        following = _TOOL if calls else {"role": "user", "content": _NEXT}
        for answer in (PROBE_CALL, PROBE_CALL | {"reasoning_content": _REASONING}) if calls else (_PLAIN,):
            last = self._render(_USER, answer, thinking=on, tools=calls)
            if mark in last:
                continued = self._render(_USER, answer, following, thinking=on, tools=calls)
                tail, follow = last.rpartition(mark)[2], continued.partition(next_mark)[0].rpartition(mark)[2]
                return self._end_of(tail, follow, following["role"])
        return Ending()

    def _end_of(self, tail: str, follow: str, role: str) -> Ending:
        """Finds an end in what stands behind an answer: `tail` at the end of a chat, `follow` before the next role."""
        at_end, goes_on = list(self._tokens.finditer(tail)), list(self._tokens.finditer(follow))
        same = _common_length([t[0] for t in at_end], [t[0] for t in goes_on])
        end = next((t for t in at_end if t[0] in self._ends), None)
        following = goes_on[same] if same < len(goes_on) else None
        if end is None and not (following and following[0] in self._ends):
            special = [t for t in at_end[: same or None] if self._added[t[0]].special]
            end = special[-1 if same else 0] if special else None
        if end is not None:
            return Ending(end[0] if role == "tool" else tail[: end.end()], len(tail) - end.end())
        if following is None or self.opening.startswith(following[0]):
            return Ending()
        own = (tail[: at_end[same].start()] if same < len(at_end) else tail).rstrip()
        text = follow[len(follow[: following.start()].rstrip()) : following.end()]
        return Ending("", len(tail) - len(own), {role: text} | ({"": text} if following is not goes_on[-1] else {}))

    def _why_endless(self) -> str:
        """Says why no end token follows the answers."""
        text = self._answers[False].rpartition(_ANSWER)[2] + self._prompts[False]
        foreign = [tag for tag in re.findall(r"<[^\w\s/][^<>\s]+[^\w\s]>|<\w+_of_\w+>", text) if tag not in self._added]
        if not foreign:
            return "no end token follows the answer"
        return (
            f"no end token follows the answer, because the template writes {foreign[0]}, which is not a token of the "
            "target's tokenizer: it is the template of another model"
        )


def split_reasoning(content: str, begin: str = THINK[0], end: str = THINK[1]) -> tuple[str, str] | None:
    """Splits the text of an answer into its reasoning and the rest, without white space around them.

    Returns:
      None if no reasoning is closed by `end` in the text. Where the prompt has `begin`, the text need not.
    """
    head, closed, rest = content.partition(end)
    if not closed or not (begin not in head or head.lstrip().startswith(begin)):
        return None
    return head.rpartition(begin)[2].strip(), rest.strip()


def _with(message: Message, reasoning: str, content: str) -> dict[str, Any]:
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    return rest | {"content": content} | ({"reasoning_content": reasoning} if reasoning.strip() else {})


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many items at the beginning of two sequences are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
