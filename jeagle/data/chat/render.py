"""Renders conversations to token ids and a loss mask, which marks the tokens that the target itself would sample.

The mask follows from the chat template alone: an answer is the text between the generation prompt and the end token,
the end token included. No pattern has to recognise headers. Every answer is verified: the supervised text must be the
text of the answer.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jeagle.config import DataConfig
from jeagle.data.chat.templates import (
    THINK_END,
    THINK_START,
    ChatTemplate,
    ConversationError,
    Messages,
    RenderRequest,
    check_sampled,
    enables_thinking,
    parse_arguments,
    split_reasoning,
    with_system,
    without_reasoning,
)
from jeagle.data.chat.token_offsets import Encoder, Encoding
from jeagle.data.sources.conversations import Conversation


class Rendered(NamedTuple):
    """One document of n tokens.

    Attributes:
      ids: token ids.
      supervised: the loss mask; True for tokens that the draft learns to predict.
      lead: number of tokens before the first turn that is not the system's.
    """

    ids: Int32[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]
    lead: int = 0


class Answer(NamedTuple):
    """An answer in a document's text.

    Attributes:
      begin: the character at which it begins.
      message: its message.
      keep_end: whether its end token is supervised.
    """

    begin: int
    message: dict[str, Any]
    keep_end: bool


class Document(NamedTuple):
    """The text of a document.

    Attributes:
      text: what the tokenizer reads.
      answers: the answers in it, in order.
      lead: number of characters before the first turn that is not the system's.
      request: what `ChatTemplate.ids` is asked, if the ids can be compared with those of transformers.
    """

    text: str
    answers: list[Answer]
    lead: int
    request: RenderRequest | None = None


class DocumentBuilder:
    """Renders conversations to the texts of their documents and locates the answers in them."""

    def __init__(self, tokenizer: Any, config: DataConfig):
        self.template = ChatTemplate(tokenizer, parse_arguments(config.template_arguments))
        self._config = config

    def one_document_each(self, conversations: Sequence[Conversation]) -> list[list[Document] | ConversationError]:
        """Puts all answers of a conversation into one document, or says why the template does not allow it."""
        requests, chats = [], []
        for conversation in conversations:
            messages, answers = self._messages(conversation)
            thinks = enables_thinking(self._config, [messages[i] for i in answers])
            whole = RenderRequest(messages, conversation.tools, thinks, False)
            requests += [whole, *(whole._replace(messages=messages[:i], prompt=True) for i in answers)]
            chats.append((whole, answers))
        texts: Iterator[Any] = iter(self.template.texts(requests))
        documents: list[list[Document] | ConversationError] = []
        for whole, answers in chats:
            text, *prompts = itertools.islice(texts, 1 + len(answers))
            if error := _first_error([text, *prompts]):
                documents.append(error)
            elif not all(map(text.startswith, prompts)):
                reason = "the chat template renders earlier turns differently when more turns follow"
                documents.append(ConversationError(reason))
            else:
                located = [
                    Answer(len(prompt), whole.messages[i], not whole.messages[i].get("cut"))
                    for i, prompt in zip(answers, prompts, strict=True)
                ]
                lead = _lead(prompts[0] if prompts else text, whole.messages)
                documents.append([Document(text, located, lead, whole)])
        return documents

    def one_document_per_answer(self, conversation: Conversation) -> list[Document]:
        """Puts each answer into a document of its own, after the history as a server shows it to the target.

        Raises:
          ConversationError: if the template does not allow this either.
        """
        messages, answers = self._messages(conversation)
        documents, lead = [], 0
        for i in answers:
            thinks = enables_thinking(self._config, [messages[i]])
            whole = RenderRequest(messages[: i + 1], conversation.tools, thinks, False)
            texts: list[Any] = self.template.texts([whole, whole._replace(messages=messages[:i], prompt=True)])
            if error := _first_error(texts):
                raise error
            text, prompt = texts
            answer = Answer(len(prompt), messages[i], not messages[i].get("cut"))
            lead = lead or _lead(prompt, messages)
            if text.startswith(prompt):
                documents.append(Document(text, [answer], lead, whole))
            else:
                documents.append(Document(prompt + _continuation(prompt, text, messages[i]), [answer], lead))
        return documents

    def _messages(self, conversation: Conversation) -> tuple[list[dict[str, Any]], list[int]]:
        """Returns the messages that are rendered, and which of them are answers to be learnt."""
        messages = with_system(conversation.messages, self._config.system_prompt)
        if self._config.reasoning == "drop":
            messages = [without_reasoning(m) for m in messages]
        return messages, [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("learn", True)]


class Renderer:
    """Renders conversations with one tokenizer and one configuration, many at a time.

    Args:
      end_token_ids: ids that may end an answer.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, end_token_ids: Sequence[int]):
        self._tokenizer, self._config = tokenizer, config
        self._builder, self._end_ids = DocumentBuilder(tokenizer, config), frozenset(end_token_ids)
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encode = Encoder(self._backend)

    def __call__(
        self, conversations: Sequence[Conversation], check: Sequence[bool] = ()
    ) -> list[list[Rendered] | ConversationError]:
        """Returns the documents of each conversation, or the reason why there are none.

        Args:
          check: for which conversations the ids are compared with those of apply_chat_template(tokenize=True), which
            costs a second tokenisation; none by default.
        """
        check = check or [False] * len(conversations)
        results: list[Any] = [None] * len(conversations)
        chats = [i for i, c in enumerate(conversations) if c.messages[0]["role"] not in ("text", "ids")]
        documents = self._builder.one_document_each([conversations[i] for i in chats])
        self._encode_all(results, dict(zip(chats, documents, strict=True)), check)
        for i, conversation in enumerate(conversations):
            if results[i] is None:
                results[i] = [self._without_turns(conversation.messages[0])]
        if self._config.rewritten == "per_answer":
            split: dict[int, list[Document] | ConversationError] = {}
            for i in chats:
                if isinstance(results[i], ConversationError):
                    try:
                        split[i] = self._builder.one_document_per_answer(conversations[i])
                    except ConversationError as error:
                        split[i] = error
            self._encode_all(results, split, check)
        return results

    def _encode_all(
        self, results: list[Any], texts: Mapping[int, list[Document] | ConversationError], check: Sequence[bool]
    ) -> None:
        """Encodes all documents together and puts them, or what is wrong with them, into `results`."""
        good = [documents for documents in texts.values() if not isinstance(documents, ConversationError)]
        encodings = iter(self._encode([document.text for documents in good for document in documents]))
        for i, documents in texts.items():
            if isinstance(documents, ConversationError):
                results[i] = documents
                continue
            pairs = [(document, next(encodings)) for document in documents]
            try:
                results[i] = [self._rendered(document, encoding, check[i]) for document, encoding in pairs]
            except ConversationError as error:
                results[i] = error

    def _rendered(self, document: Document, encoding: Encoding, check: bool) -> Rendered:
        ids, bos = encoding.ids, self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise ConversationError("the template begins with the bos token twice")
        supervised = np.zeros(len(ids), bool)
        for answer in document.answers:
            first, last = self._locate(answer, document.text, encoding, ids)
            supervised[first : last + answer.keep_end] = True
        if check and document.request is not None:
            theirs = self._builder.template.ids(document.request)
            if theirs != ids:
                first = next((i for i, (a, b) in enumerate(zip(theirs, ids, strict=False)) if a != b), len(ids))
                raise ConversationError(f"the ids differ from those of apply_chat_template at token {first}")
        return Rendered(np.array(ids, np.int32), supervised, encoding.char_to_token(document.lead) or 0)

    def _locate(self, answer: Answer, text: str, encoding: Encoding, ids: list[int]) -> tuple[int, int]:
        """Returns the answer's first token and its end token."""
        character, first = answer.begin, None
        while first is None and character < len(text):  # some tokenizers leave leading spaces out of their offsets
            first, character = encoding.char_to_token(character), character + 1
        if first is None:
            raise ConversationError("no end token follows the answer")
        while first > 0 and encoding.token_to_chars(first - 1)[1] > answer.begin:  # tokens of such spaces alone
            first -= 1
        if encoding.token_to_chars(first)[0] < answer.begin:
            raise ConversationError("the tokenizer joins the answer with the text around it")
        last = next((i for i in range(first, len(ids)) if ids[i] in self._end_ids), None)
        if last is None:
            raise ConversationError("no end token follows the answer")
        sampled = text[answer.begin : encoding.token_to_chars(last)[0]]
        check_sampled(sampled, answer.message, starts_special=ids[first] in self._special_ids)
        return first, last

    def _without_turns(self, message: Mapping[str, Any]) -> Rendered:
        """Takes token ids as they are, or encodes a text.

        All but the first token of a text is supervised, and an end token is appended if the text is not cut off.
        """
        if message["role"] == "ids":
            return Rendered(np.array(message["ids"], np.int32), np.array(message["mask"], bool))
        ids = self._backend.encode(message["content"], add_special_tokens=False).ids
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        ids = ([bos] if bos is not None else []) + ids + ([eos] if eos is not None and not message.get("cut") else [])
        supervised = np.ones(len(ids), bool)
        supervised[:1] = False
        return Rendered(np.array(ids, np.int32), supervised)


def _first_error(texts: Sequence[Any]) -> ConversationError | None:
    return next((text for text in texts if isinstance(text, ConversationError)), None)


def _lead(prompt: str, messages: Messages) -> int:
    """Returns the character at which the first turn that is not the system's begins, in the first answer's prompt.

    It is the last occurrence of the turn's text, because a short turn may occur in the system prompt too. If the
    template rewrites the turn, it is the end of the prompt.
    """
    first = next((m["content"] for m in messages if m["role"] != "system"), "")
    begin = prompt.rfind(first.strip())
    return begin if begin >= 0 else len(prompt)


def _continuation(prompt: str, text: str, message: dict[str, Any]) -> str:
    """Returns what the target samples after a prompt that opens a reasoning block, if the template then drops it.

    Raises:
      ConversationError: if the prompt does not open a reasoning block.
    """
    if not prompt.rstrip().endswith(THINK_START):
        raise ConversationError("the chat template renders an answer differently than its generation prompt begins")
    reasoning, content = split_reasoning(message)
    if not (reasoning and content):
        raise ConversationError("the generation prompt opens a reasoning block that the answer does not have")
    tail = text.rpartition(content)[2]
    return f"{reasoning}\n{THINK_END}\n\n{content}{tail}"
