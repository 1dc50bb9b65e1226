"""Conversations -> the texts of training documents, with the places of the answers in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jeagle.data.answers import CLOSE, OPEN, ConversationError, split_reasoning, without_reasoning
from jeagle.data.texts import Messages, Request, Rules, TextMaker, with_system


class Span(NamedTuple):
    """An answer in a document's text: where it begins, in characters, its message, and whether its end is learnt."""

    begin: int
    message: dict[str, Any]
    keep_end: bool


class Document(NamedTuple):
    """A document's text, the answers in it, how many characters stand before its first turn but the system's, and the
    template's inputs where its ids can be compared."""

    text: str
    spans: list[Span]
    lead: int
    inputs: tuple[Messages, Sequence[dict], bool] | None = None


class Planner:
    """Conversations -> the texts of their documents, with the answers' places."""

    def __init__(self, tokenizer: Any, rules: Rules):
        self.maker, self._rules = TextMaker(tokenizer, rules.arguments), rules

    def messages(self, conversation: Any) -> list[dict[str, Any]]:
        """Its messages as they are rendered."""
        found = with_system(conversation.messages, self._rules.system_prompt)
        return [without_reasoning(m) for m in found] if self._rules.reasoning == "drop" else found

    def together(self, conversations: Sequence[Any]) -> list[list[Document] | ConversationError]:
        """One document each, with all answers in it; an error where the template rewrites history."""
        requests, shares = [], []
        for c in conversations:
            messages = self.messages(c)
            thinks = self._rules.thinks([m for m in messages if m["role"] == "assistant"])
            cuts = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            asked = [Request(messages, c.tools, thinks, False)]
            asked += [Request(messages[:i], c.tools, thinks, True) for i in cuts]
            requests += asked
            shares.append((messages, cuts, len(asked)))
        texts = iter(self.maker.texts(requests))
        return [
            self._whole(c, messages, cuts, [next(texts) for _ in range(count)])
            for c, (messages, cuts, count) in zip(conversations, shares, strict=True)
        ]

    def _whole(self, conversation: Any, messages: Messages, cuts: list[int], texts: list[Any]):
        if error := next((t for t in texts if isinstance(t, ConversationError)), None):
            return error
        whole, *prompts = texts
        if not all(map(whole.startswith, prompts)):
            return ConversationError("the chat template renders earlier turns differently once more follow")
        spans = [
            Span(len(prompt), messages[i], not (conversation.truncated and i == cuts[-1]))
            for i, prompt in zip(cuts, prompts, strict=True)
        ]
        thinks = self._rules.thinks([messages[i] for i in cuts])
        lead = _lead(prompts[0] if prompts else whole, messages)
        return [Document(whole, spans, lead, (messages, conversation.tools, thinks))]

    def apart(self, conversation: Any) -> list[Document]:
        """One document for each answer, after the history as a server shows it. ConversationError where it cannot."""
        messages = self.messages(conversation)
        cuts = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        documents, lead = [], 0
        for i in cuts:
            thinks = self._rules.thinks([messages[i]])
            asked = [Request(messages[: i + 1 - prompt], conversation.tools, thinks, bool(prompt)) for prompt in (0, 1)]
            whole, prompt = (_good(text) for text in self.maker.texts(asked))
            span = Span(len(prompt), messages[i], not (conversation.truncated and i == cuts[-1]))
            lead = lead or _lead(prompt, messages)
            if whole.startswith(prompt):
                documents.append(Document(whole, [span], lead, (messages[: i + 1], conversation.tools, thinks)))
            else:
                documents.append(Document(prompt + _continuation(prompt, whole, messages[i]), [span], lead))
        return documents


def _lead(prompt: str, messages: Messages) -> int:
    """Where the first turn but the system's begins, in the prompt of the first answer.

    The last place, since a short turn may stand in the system's too; the prompt's end where a template writes the turn
    in other words.
    """
    first = next((m["content"] for m in messages if m["role"] != "system"), "")
    place = prompt.rfind(first.strip())
    return place if place >= 0 else len(prompt)


def _good(text: str | ConversationError) -> str:
    if isinstance(text, ConversationError):
        raise text
    return text


def _continuation(prompt: str, whole: str, message: dict[str, Any]) -> str:
    """What the target samples after a prompt that opens its reasoning, which the template then leaves out.

    ConversationError where the prompt opens none.
    """
    if not prompt.rstrip().endswith(OPEN):
        raise ConversationError("the chat template renders an answer differently than its generation prompt begins")
    reasoning, content = split_reasoning(message)
    if not (reasoning and content):
        raise ConversationError("the generation prompt opens a reasoning that the answer does not have")
    tail = whole.rpartition(content)[2]
    return f"{reasoning}\n{CLOSE}\n\n{content}{tail}"
