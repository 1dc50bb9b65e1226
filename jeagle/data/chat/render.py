"""Renders conversations to token ids and a loss mask, which marks the tokens that the target itself would sample."""

import functools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jeagle.config import DataConfig
from jeagle.data.chat.documents import Document, DocumentBuilder, template_and_form
from jeagle.data.chat.templates import ConversationError, Messages, RenderRequest, with_system
from jeagle.data.chat.token_offsets import Encoder, Encoding
from jeagle.data.sources.conversations import Conversation
from jeagle.data.sources.schema import prompt_ids
from jeagle.runtime.manifest import fingerprint


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


class Renderer:
    """Renders conversations with one tokenizer and one configuration, many at a time.

    Args:
      end_token_ids: ids that end an answer by the target's configuration.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, end_token_ids: Sequence[int]):
        self._tokenizer, self._config = tokenizer, config
        self._end_token_ids = tuple(end_token_ids)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encode = Encoder(self._backend)

    @functools.cached_property
    def _builder(self) -> DocumentBuilder:
        """Rows without turns need no template."""
        return DocumentBuilder(self._tokenizer, self._config, self._end_token_ids)

    def __call__(
        self, conversations: Sequence[Conversation], check: Sequence[bool] = ()
    ) -> list[list[Rendered] | ConversationError]:
        """Returns the documents of each conversation, or the reason why there are none.

        Args:
          check: for which conversations the ids of the last prompt are compared with those of
            apply_chat_template(tokenize=True), which costs a second tokenisation; none by default.
        """
        check = check or [False] * len(conversations)
        results: list[Any] = [None] * len(conversations)
        chats = []
        for i, conversation in enumerate(conversations):
            if conversation.messages[0]["role"] in ("text", "ids"):
                results[i] = [self._without_turns(conversation.messages[0])]
            else:
                chats.append(i)
        built = self._builder([conversations[i] for i in chats]) if chats else []
        good = [documents for documents in built if not isinstance(documents, ConversationError)]
        encodings = iter(self._encode([document.text for documents in good for document in documents]))
        for i, documents in zip(chats, built, strict=True):
            if isinstance(documents, ConversationError):
                results[i] = documents
                continue
            pairs = [(document, next(encodings)) for document in documents]
            try:
                results[i] = self._joined([self._rendered(document, found, check[i]) for document, found in pairs])
            except ConversationError as error:
                results[i] = error
        return results

    def thinks(self, conversation: Conversation) -> bool:
        """Whether thinking is on in the prompt of the first answer that is learnt."""
        return self._builder.turns(conversation)[0].prompt.thinking

    def _rendered(self, document: Document, encoding: Encoding, check: bool) -> Rendered:
        ids, bos = encoding.ids, self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise ConversationError("the template begins with the bos token twice")
        prompt, supervised = len(ids), np.zeros(len(ids) + len(document.sampled_ids), bool)
        supervised[len(ids) :] = True
        for span in document.spans:
            prompt, stop = (_token_at(place, document.text, encoding) for place in (span.begin, span.stop))
            if span.sampled_hash and fingerprint(ids[prompt:stop]) != span.sampled_hash:
                raise ConversationError("an answer's text gives other ids than its sampled_ids, which are missing")
            supervised[prompt:stop] = True
        if check:
            theirs, ours = self._builder.template.ids(document.prompt), ids[:prompt]
            if theirs != ours:
                first = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
                raise ConversationError(f"the ids differ from those of apply_chat_template at token {first}")
        lead = encoding.char_to_token(document.lead) or 0
        return Rendered(np.array([*ids, *document.sampled_ids], np.int32), supervised, lead)

    def _joined(self, documents: list[Rendered]) -> list[Rendered]:
        """Joins documents that continue one another, as sampled ids may do, and refuses several if they must be one."""
        joined: list[Rendered] = []
        for document in documents:
            last = joined[-1] if joined else None
            if last is not None and np.array_equal(document.ids[: len(last.ids)], last.ids):
                document.supervised[: len(last.ids)] |= last.supervised
                joined.pop()
            joined.append(document)
        if len(joined) > 1 and self._config.rewritten == "reject":
            raise ConversationError("the chat template renders earlier turns differently when more turns follow")
        return joined

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


def render_prompt(
    tokenizer: Any,
    messages: Messages,
    *,
    system_prompt: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
    thinking: bool = True,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    end_token_ids: Sequence[int] = (),
) -> Int32[np.ndarray, " T"]:
    """Returns the ids of a conversation up to where the target is to answer, generation prompt included.

    A plain text is tokenised as it is, and token ids are returned up to the first supervised one.

    Raises:
      ConversationError: if the template cannot render the messages.
    """
    if messages[0]["role"] == "ids":
        return np.asarray(prompt_ids(messages[0]), np.int32)
    if messages[0]["role"] == "text":
        return np.asarray(tokenizer(messages[0]["content"])["input_ids"], np.int32)
    given = json.dumps(dict(arguments)) if arguments else ""
    template, form = template_and_form(tokenizer, given, tuple(end_token_ids), tools=bool(tools))
    fields = [form.with_fields(message, thinking) for message in with_system(messages, system_prompt)]
    text = template.texts([RenderRequest(template.shown(fields), tools, thinking, True)])[0]
    if isinstance(text, ConversationError):
        raise text
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _token_at(place: int, text: str, encoding: Encoding) -> int:
    """Returns the token that begins at a character.

    Raises:
      ConversationError: if a token contains the characters on both sides of it.
    """
    token, character = None, place
    while token is None and character < len(text):  # some tokenizers leave leading spaces out of their offsets
        token, character = encoding.char_to_token(character), character + 1
    token = len(encoding.ids) if token is None else token
    while token > 0 and encoding.token_to_chars(token - 1)[1] > place:  # tokens of such spaces alone
        token -= 1
    if token < len(encoding.ids) and encoding.token_to_chars(token)[0] < place:
        raise ConversationError("the tokenizer joins the answer with the text around it")
    return token
