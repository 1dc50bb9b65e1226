"""The form of a chat template's answers: what the target samples before, between and after their parts.

The form is found by rendering a few chats whose fields are known marks. With it, the text that a target samples can be
written where the template shows another one: templates drop the reasoning of earlier answers, and their generation
prompts open a reasoning block, or contain an empty one that is not shown later.
"""

import re
from collections.abc import Mapping
from typing import Any

from jeagle.data.chat.probing import ANSWER, THINK, Ending, ProbedForm
from jeagle.data.chat.templates import ConversationError

Message = Mapping[str, Any]


class AnswerForm(ProbedForm):
    """Writes what a target samples in the form that its chat template shows."""

    def ending(self, message: Message, shown: str, next_role: str, *, thinking: bool) -> str:
        """Returns the text that ends an answer; empty if it was cut off, or if only a further turn would end it.

        Args:
          shown: what the template writes for a chat that ends with the answer.
          next_role: role of the next message; empty if there is none.

        Raises:
          ConversationError: if no end token ever follows such an answer.
        """
        if message.get("cut"):
            return ""
        ending = self._ending(message, shown, thinking)
        if not (ending.text or ending.by_next):
            _check_calls(message, shown)
            raise ConversationError(self._why_endless())
        return ending.text or ending.by_next.get(next_role, ending.by_next.get("", ""))

    def _ending(self, message: Message, shown: str, thinking: bool) -> Ending:
        calls = message.get("tool_calls")
        if ending := self._endings[bool(calls), thinking]:
            return ending
        # The template refuses chats of marks. Only the chat itself shows how the answer ends.
        tail = shown.rpartition(calls[-1]["function"]["name"] if calls else message["content"].strip())[2]
        return self._end_of(tail, "", "tool" if calls else "user")

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
            return self._without_ends(opened + message["reasoning_content"].lstrip())
        body = self._body(prompt, shown, message, previous.strip(), self._ending(message, shown, thinking))
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
        self._without_ends(text.replace(self.close, "", 1) if reasoning else text)
        return text

    def _without_ends(self, text: str) -> str:
        if self.has_end(text):
            raise ConversationError("an end token stands within an answer")
        return text

    def has_end(self, text: str) -> bool:
        """Whether a text contains an end token."""
        return any(end in text for end in self._ends)

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
        _check_calls(message, shown)
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
        head = next((head for head in self._heads.values() if head and body.startswith(head)), "")
        return self.lead + body.removeprefix(head) if head else body

    def _behind(self, prompt: str, shown: str, previous: str) -> int | None:
        """Returns where an answer begins in the chat that ends with it, or None if that is not known.

        The prompt may have more at its end than the chat, and the history may change once it is answered. Then the
        answer begins behind the last message before it.
        """
        extras = {"", *self._extras.values(), self.open, self.open + self.close}
        bases = [prompt.removesuffix(extra) for extra in sorted(extras, key=len) if prompt.endswith(extra)]
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
        if thinking and self.answers_plainly:
            return ": use --data.thinking off"
        return ": give answers with reasoning, such as the target's own (python -m jeagle.regenerate)"

    def _is_closed(self, prompt: str) -> bool:
        """Whether a prompt contains a reasoning block, open or not, that it closes."""
        end = self.close.strip()
        return prompt.rstrip().endswith(end) and not self._prompts[True].rstrip().endswith(end)

    def _without_marks(self, text: str) -> str:
        """Returns the text of an answer without the special tokens that stand around it."""
        lead, ending = self.lead.strip(), self._endings[False, False]
        end = ending.text.strip() if ending else ""
        if self._tokens.search(lead) and text.lstrip().startswith(lead):
            text = text.lstrip().removeprefix(lead)
        return text.removesuffix(end) if end else text

    def _why_endless(self) -> str:
        """Says why no end token follows the answers."""
        text = self._answers[False].rpartition(ANSWER)[2] + self._prompts[False]
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


def _check_calls(message: Message, shown: str) -> None:
    """Checks that the text of a chat contains the names of an answer's tool calls."""
    for call in message.get("tool_calls", ()):
        if (name := call["function"]["name"]) not in shown:
            raise ConversationError(f"the template does not write tool calls ({name})")


def _with(message: Message, reasoning: str, content: str) -> dict[str, Any]:
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    return rest | {"content": content} | ({"reasoning_content": reasoning} if reasoning.strip() else {})
