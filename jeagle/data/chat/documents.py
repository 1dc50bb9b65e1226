"""The texts of documents: the prompt of every answer, and what the target samples behind it.

A prompt is what a server sends: the history as the template shows it at that time, and the generation prompt. Answers
share a document as long as each prompt continues the text of the answers before it.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jeagle.config import DataConfig
from jeagle.data.chat.form import AnswerForm, split_reasoning
from jeagle.data.chat.templates import (
    ChatTemplate,
    ConversationError,
    Messages,
    RenderRequest,
    parse_arguments,
    sampled_with,
    with_system,
)
from jeagle.data.sources.conversations import Conversation


class Span(NamedTuple):
    """What the target samples for one answer, in a document's text.

    Attributes:
      begin, stop: its first character, and the one behind it.
      sampled_hash: fingerprint of the ids that the target sampled; empty if it is not known.
    """

    begin: int
    stop: int
    sampled_hash: str = ""


class Document(NamedTuple):
    """The text of a document.

    Attributes:
      text: what the tokenizer reads.
      spans: the supervised parts of the text, in order.
      lead: number of characters before the first turn that is not the system's.
      prompt: the request for the prompt of the last answer.
      sampled_ids: supervised ids behind the text, which is then a prompt.
    """

    text: str
    spans: tuple[Span, ...]
    lead: int
    prompt: RenderRequest
    sampled_ids: tuple[int, ...] = ()


class Turn(NamedTuple):
    """An answer to be learnt.

    Attributes:
      message: the answer; it has sampled_ids and sampled_hash only where they are valid.
      form: the form of its text.
      prompt, shown: the requests for its prompt, and for the chat that ends with it.
      next_role: role of the message after it; empty if there is none.
    """

    message: dict[str, Any]
    form: AnswerForm
    prompt: RenderRequest
    shown: RenderRequest
    next_role: str


class DocumentBuilder:
    """Renders conversations to the texts of their documents, in which it locates the answers."""

    def __init__(self, tokenizer: Any, config: DataConfig, end_token_ids: Sequence[int]):
        self.template, self._config = ChatTemplate(tokenizer, parse_arguments(config.template_arguments)), config
        self._form_of = functools.partial(template_and_form, tokenizer, config.template_arguments, end_token_ids)
        self._sampled_with = sampled_with(tokenizer)

    def __call__(self, conversations: Sequence[Conversation]) -> list[list[Document] | ConversationError]:
        """Returns the documents of each conversation, or why there are none."""
        chats: dict[int, list[Turn]] = {}
        results: list[Any] = [None] * len(conversations)
        for i, conversation in enumerate(conversations):
            try:
                chats[i] = self.turns(conversation)
            except ConversationError as error:
                results[i] = error
        # The text of a whole plain chat shows all of its answers as they are sampled. Others need a text for each.
        plain = {i for i, turns in chats.items() if self._is_plain(turns)}
        requests = {i: [turn.prompt for turn in turns] for i, turns in chats.items()}
        texts = self._texts({i: some + [chats[i][-1].shown] * (i in plain) for i, some in requests.items()}, results)
        whole = {i: texts[i].pop() for i in plain & texts.keys()}
        for i, text in whole.items():
            if (document := self._plain_document(chats[i], texts[i], text)) is not None:
                results[i] = [document]
        rest = [i for i in texts if results[i] is None]
        shown = self._texts({i: [turn.shown for turn in chats[i] if not _is_sampled(turn)] for i in rest}, results)
        for i in shown:
            try:
                results[i] = self._documents(chats[i], texts[i], iter(shown[i]))
            except ConversationError as error:
                results[i] = error
        return results

    def turns(self, conversation: Conversation) -> list[Turn]:
        """Returns the answers to be learnt.

        Raises:
          ConversationError: if a turn has no form in the template, or if it spells the beginning of an answer.
        """
        (_, form), config = self._form_of(tools=bool(conversation.tools)), self._config
        messages = [
            form.with_fields(m, conversation.thinking) for m in with_system(conversation.messages, config.system_prompt)
        ]
        if config.reasoning == "drop":
            messages = [_without_reasoning(m) for m in messages]
        if form.opening and any(form.opening in m["content"] for m in messages if m["role"] != "assistant"):
            raise ConversationError(
                f"a turn that is not the assistant's contains {form.opening}, which opens an answer"
            )
        if conversation.sampled_with != self._sampled_with:
            messages = [_without(m, "sampled_ids", "sampled_hash") for m in messages]
        seen, turns = self.template.shown(messages), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("learn", True):
                prompt = RenderRequest(seen[:i], conversation.tools, self._thinks(message, conversation), True)
                shown = prompt._replace(messages=seen[: i + 1], prompt=False)
                next_role = messages[i + 1]["role"] if i + 1 < len(messages) else ""
                turns.append(Turn(message, form, prompt, shown, next_role))
        if not turns:
            raise ConversationError("the conversation has no answer to learn")
        return turns

    def _thinks(self, message: dict[str, Any], conversation: Conversation) -> bool:
        """Returns the value of the template's `enable_thinking` with which an answer is sampled."""
        if self._config.thinking != "auto":
            return self._config.thinking == "on"
        if conversation.thinking is not None and self._config.reasoning == "keep":
            return conversation.thinking
        return bool(message.get("reasoning_content"))

    def _is_plain(self, turns: Sequence[Turn]) -> bool:
        return all(
            turn.message.keys() <= {"role", "content", "cut", "learn"} and turn.form.is_simple[turn.prompt.thinking]
            for turn in turns
        )

    def _texts(self, requests: Mapping[int, list[RenderRequest]], results: list[Any]) -> dict[int, list[str]]:
        """Renders all requests together; what is wrong with the chats that cannot be rendered goes into `results`."""
        texts: Iterator[Any] = iter(self.template.texts([request for some in requests.values() for request in some]))
        rendered = {}
        for i, some in requests.items():
            found = list(itertools.islice(texts, len(some)))
            results[i] = next((text for text in found if isinstance(text, ConversationError)), results[i])
            if results[i] is None:
                rendered[i] = found
        return rendered

    def _plain_document(self, turns: Sequence[Turn], prompts: Sequence[str], whole: str) -> Document | None:
        """Returns the document of a plain chat, or None if its text does not show all answers as they are sampled."""
        spans = []
        for turn, prompt in zip(turns, prompts, strict=True):
            end = turn.form.ending(turn.message, whole, turn.next_role, thinking=turn.prompt.thinking)
            content = turn.message["content"]
            # Templates remove white space around the text, or some of it.
            forms = (f"{turn.form.lead}{text}{end}" for text in (content, content.strip(), content.lstrip()))
            length = next((len(text) for text in forms if whole.startswith(text, len(prompt))), 0)
            if not length or not whole.startswith(prompt) or turn.form.has_end(content):
                return None
            spans.append(Span(len(prompt), len(prompt) + length))
        return Document(whole, tuple(spans), _lead(prompts[0], turns[0].prompt.messages), turns[-1].prompt)

    def _documents(self, turns: Sequence[Turn], prompts: Sequence[str], shown: Iterator[str]) -> list[Document]:
        """Returns the documents of a chat in which each answer stands behind its own prompt."""
        documents: list[Document] = []
        lead = _lead(prompts[0], turns[0].prompt.messages)
        for turn, prompt in zip(turns, prompts, strict=True):
            if _is_sampled(turn):
                documents.append(Document(prompt, (), lead, turn.prompt, tuple(turn.message["sampled_ids"])))
                continue
            previous, thinking = turn.prompt.messages[-1:], turn.prompt.thinking
            before = (previous[0]["content"] or "") if previous else ""
            chat = next(shown)
            text = prompt + turn.form.sampled(prompt, chat, turn.message, before, thinking=thinking)
            end = turn.form.ending(turn.message, chat, turn.next_role, thinking=thinking)
            span = Span(len(prompt), len(text + end), turn.message.get("sampled_hash", ""))
            document = Document(text + end, (span,), lead, turn.prompt)
            if documents and not documents[-1].sampled_ids and prompt.startswith(documents[-1].text):
                document = document._replace(spans=(*documents.pop().spans, span))
            documents.append(document)
        return documents


def template_and_form(
    tokenizer: Any, arguments: str, end_token_ids: Sequence[int], *, tools: bool
) -> tuple[ChatTemplate, AnswerForm]:
    """Returns the template with these further variables (JSON), and the form of answers with tools or without."""
    return _cached_form(tokenizer, str(tokenizer.chat_template), arguments, tuple(end_token_ids), tools)


@functools.lru_cache(maxsize=8)
def _cached_form(
    tokenizer: Any, _: str, arguments: str, ends: tuple[int, ...], tools: bool
) -> tuple[ChatTemplate, AnswerForm]:
    template = ChatTemplate(tokenizer, parse_arguments(arguments))
    return template, AnswerForm(template, tokenizer.added_tokens_decoder, ends, tools=tools)


def _is_sampled(turn: Turn) -> bool:
    return bool(turn.message.get("sampled_ids"))


def _without(message: dict[str, Any], *names: str) -> dict[str, Any]:
    return {n: v for n, v in message.items() if n not in names} if message.keys() & set(names) else message


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Returns an answer without its reasoning, and so without the ids that were sampled with it."""
    parts = split_reasoning(message["content"]) if message["role"] == "assistant" else None
    if parts is None and not message.get("reasoning_content"):
        return message
    rest = _without(message, "reasoning_content", "sampled_ids", "sampled_hash")
    return rest if parts is None else rest | {"content": parts[1]}


def _lead(prompt: str, messages: Messages) -> int:
    """Returns the character at which the first turn that is not the system's begins, in the first answer's prompt.

    It is the last occurrence of the turn's text, because a short turn may occur in the system prompt too. If the
    template rewrites the turn, it is the end of the prompt.
    """
    first = next((m["content"] for m in messages if m["role"] != "system"), "") or ""
    begin = prompt.rfind(first.strip())
    return begin if begin >= 0 else len(prompt)
