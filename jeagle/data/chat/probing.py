"""Finds the form of a chat template's answers by rendering a few chats whose fields are known marks."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jeagle.data.chat.templates import PROBE_CALL, PROBE_TOOL, PROBE_VALUE, ChatTemplate, RenderRequest

THINK = ("<think>", "</think>")
_QUESTION, ANSWER, _REASONING = "jeaglequestion", "jeagleanswer", "jeaglereasoning"
_NEXT, _RESULT = "jeaglenext", "jeagleresult"
_USER, _PLAIN = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": ANSWER}
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


class ProbedForm:
    """What a chat template shows of the form of its answers.

    Args:
      added: the tokenizer's added tokens by id.
      end_token_ids: ids that end an answer by the target's configuration.

    Attributes:
      open, close: what the target samples before and after its reasoning; empty if the template knows no reasoning.
      opens: whether the generation prompt opens a reasoning block where thinking is on.
      lead: what the target samples immediately before the text of an answer.
      opening: the special tokens, with the text between them, that open an answer; empty if there are none.
      is_simple: thinking switch -> whether a plain answer stands as it is behind its generation prompt.
      answers_plainly: whether an answer without reasoning can be sampled where thinking is off.
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
        self.close, self.lead = self._close_and_lead()
        self.opens = self._is_open(self._prompts[True])
        self.is_simple = {on: self._shows_plainly(on) for on in (False, True)}
        is_bare = bool(self._extras[False]) or self._without_empty_block(self._heads[False]) == self._heads[False]
        self.answers_plainly = bool(self._prompts[False]) and not self._is_open(self._prompts[False]) and is_bare
        self.opening = self._find_opening()
        ways = [(calls, on) for calls in (False, True) for on in (False, True)]
        self._endings = {(calls, on): self._find_ending(calls, on) for calls, on in ways}

    def _is_open(self, prompt: str) -> bool:
        return bool(self.open) and prompt.rstrip().endswith(self.open.strip())

    def _without_empty_block(self, text: str) -> str:
        """Returns a text without the empty reasoning block at its beginning, whose first tag the prompt may have."""
        begin, end = map(str.strip, (self.open, self.close) if self.open else THINK)
        if found := re.match(rf"\s*(?:{re.escape(begin)})?\s*{re.escape(end)}", text):
            return text[found.end() :].removeprefix(self.close[len(self.close.rstrip()) :])
        return text

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
        """Returns what stands before the reasoning, and between it and the text of an answer, `lead` included."""
        calls = PROBE_CALL | {"reasoning_content": _REASONING}
        plain = _PLAIN | {"reasoning_content": _REASONING}
        for message, tools in ((plain, False), (calls | {"content": ANSWER}, True), (calls, True)):
            before, found, after = self._render(_USER, message, thinking=True, tools=tools).partition(_REASONING)
            between, answered, _ = after.partition(ANSWER)
            if not answered:  # the calls follow, as they stand without reasoning
                bare = self._render(_USER, PROBE_CALL, thinking=True, tools=True)
                stop = max(1, len(after) - _common_length(after[::-1], bare[::-1]))
                between = after[
                    : max([stop, *(t.end() for t in re.finditer(_TAG, after) if t.start() < stop < t.end())])
                ]
            if found and PROBE_CALL["tool_calls"][0]["function"]["name"] not in between:
                prompt = self._render(_USER, thinking=True, prompt=True, tools=tools)
                base = prompt if before.startswith(prompt) else prompt.removesuffix(self._extras[True])
                opened = before.removeprefix(base) if before.startswith(base) else ""
                return opened if opened.strip() else self._opened(before), between
        return self._unseen_marks()

    def _opened(self, before: str) -> str:
        """Returns what opens the reasoning at the end of a prompt: what other texts lack there, or a last tag."""
        following = {"role": "user", "content": _NEXT}
        others = (self._answers[True], self._prompts[False], self._render(_USER, _PLAIN, following, thinking=True))
        beyond = [self._extras[True], *(self._beyond(before, other) for other in others)]
        tag = re.search(rf"(?:{_TAG})\s*$", before)
        return next((text for text in beyond if text.strip() and _QUESTION not in text), tag[0] if tag else "")

    def _close_and_lead(self) -> tuple[str, str]:
        """Returns what closes the reasoning, and what stands before the text of an answer even without reasoning."""
        first = re.match(rf"\s*({_TAG})", self.close)
        tags = tuple(tag for tag in (self.open.strip(), first[1] if first else self.close.strip()) if tag)
        for on in (False, True):
            extra, head = self._extras[on].strip(), self._heads[on]
            if self._prompts[on] and not (tags and head.strip().startswith(tags)):
                lead = head if not extra or (tags and extra.startswith(tags)) else ""
                return self.close.removesuffix(lead), lead
        # Answers without reasoning have an empty block. What follows it before a call is no lead of a text.
        calls = self._render(_USER, PROBE_CALL | {"reasoning_content": _REASONING}, thinking=True, tools=True)
        _, found, after = calls.partition(_REASONING)
        closed = len(self.close) - len(self._beyond(self.close, after)) if found else len(self.close)
        return self.close[:closed], self.close[closed:]

    def _unseen_marks(self) -> tuple[str, str]:
        """Returns the marks of reasoning, by its prompts and the tags it mentions, of a template that writes none."""
        for begin, end in _PAIRS:
            if begin not in self._template.source and end not in self._template.source:
                continue
            for text in (*self._prompts.values(), self._answers[False]):
                if block := re.search(rf"{re.escape(begin)}(\s*)(?:{re.escape(end)}(\s*)(?:$|{ANSWER})|$)", text):
                    line = "\n" if "\n" in block[1] else ""
                    return begin + line, line + end + (line * 2 if block[2] is None else block[2])
            line = "\n" if begin == THINK[0] else ""  # the most common form
            return begin + line, line + end + line * 2
        block = self._extras[False]  # an empty block where thinking is off, whose last tag closes it
        tags = [tag.start() for tag in re.finditer(_TAG, block)]
        return (block[: tags[-1]], block[tags[-1] :]) if len(tags) > 1 and not self._extras[True] else ("", "")

    def _head(self, on: bool) -> str:
        """Returns what the template shows of a plain answer before its text, behind what its prompt begins with."""
        base, shown = self._prompts[on].removesuffix(self._extras[on]), self._answers[on]
        return shown[len(base) :].partition(ANSWER)[0] if base and shown.startswith(base) else ""

    def _shows_plainly(self, on: bool) -> bool:
        prompt, shown = self._prompts[on], self._answers[on]
        return bool(prompt) and shown.startswith(prompt + self.lead + ANSWER) and not self._is_open(prompt)

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

    def _find_ending(self, calls: bool, on: bool) -> Ending | None:
        """Finds how answers end from chats that end with one or go on; None if the template does not write them."""
        mark, next_mark = (PROBE_VALUE, _RESULT) if calls else (ANSWER, _NEXT)
        following = _TOOL if calls else {"role": "user", "content": _NEXT}
        for answer in (PROBE_CALL, PROBE_CALL | {"reasoning_content": _REASONING}) if calls else (_PLAIN,):
            last = self._render(_USER, answer, thinking=on, tools=calls)
            if mark in last:
                continued = self._render(_USER, answer, following, thinking=on, tools=calls)
                tail, follow = last.rpartition(mark)[2], continued.partition(next_mark)[0].rpartition(mark)[2]
                return self._end_of(tail, follow, following["role"])
        return None

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


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns how many items at the beginning of two sequences are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
