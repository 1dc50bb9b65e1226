"""Conversations -> token ids and the mask of what the target itself would have sampled.

The mask comes from the chat template alone: whatever stands between the generation prompt and the end of an answer,
the end token included. No pattern guesses at headers. Each answer is verified: the supervised text is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jeagle.data.answers import ConversationError, check_sampled
from jeagle.data.conversations import Conversation
from jeagle.data.documents import Document, Planner, Span
from jeagle.data.texts import Messages, Rules
from jeagle.data.token_offsets import Encoder, Encoding


class Rendered(NamedTuple):
    """ids int32 [n] and supervised bool [n] of one document; the first `lead` are what stands before its first turn."""

    ids: np.ndarray
    supervised: np.ndarray
    lead: int = 0


class Renderer:
    """Renders conversations by one tokenizer and one set of rules, many at a time."""

    def __init__(self, tokenizer: Any, rules: Rules):
        self._tokenizer, self._rules = tokenizer, rules
        self._planner, self._ends = Planner(tokenizer, rules), sorted(set(rules.end_token_ids))
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._encode = Encoder(self._backend)

    def __call__(
        self, conversations: Sequence[Conversation], check: Sequence[bool] = ()
    ) -> list[list[Rendered] | ConversationError]:
        """The documents of each conversation, or why there are none.

        Args:
          check: for which of them ids are compared with apply_chat_template(tokenize=True), which costs a second
            tokenisation; none by default.
        """
        check = check or [False] * len(conversations)
        found: list[Any] = [None] * len(conversations)
        chats = []
        for i, conversation in enumerate(conversations):
            if conversation.messages[0]["role"] == "text":
                found[i] = [self._plain(conversation.messages[0]["content"], keep_end=not conversation.truncated)]
            else:
                chats.append(i)
        plans = self._planner.together([conversations[i] for i in chats])
        self._fill(found, dict(zip(chats, plans, strict=True)), check)
        if self._rules.rewritten == "per_answer":
            failed = [i for i in chats if isinstance(found[i], ConversationError)]
            self._fill(found, {i: self._apart(conversations[i]) for i in failed}, check)
        return found

    def _apart(self, conversation: Conversation) -> list[Document] | ConversationError:
        try:
            return self._planner.apart(conversation)
        except ConversationError as error:
            return error

    def _fill(self, found: list[Any], plans: Mapping[int, Any], check: Sequence[bool]) -> None:
        """Encodes the documents of `plans` all at once, and puts them, or what is wrong with them, into `found`."""
        good = {i: documents for i, documents in plans.items() if not isinstance(documents, ConversationError)}
        texts = [document.text for documents in good.values() for document in documents]
        encodings = iter(self._encode(texts))
        for i, documents in plans.items():
            if isinstance(documents, ConversationError):
                found[i] = documents
                continue
            pairs = [(document, next(encodings)) for document in documents]
            try:
                found[i] = [self._mark(document, encoding, check[i]) for document, encoding in pairs]
            except ConversationError as error:
                found[i] = error

    def _mark(self, document: Document, encoding: Encoding, check: bool) -> Rendered:
        ids = encoding.ids
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise ConversationError("the template begins with the bos token twice")
        supervised = np.zeros(len(ids), bool)
        for span in document.spans:
            first, last = self._answer(document.text, span, encoding, ids)
            supervised[first : last + span.keep_end] = True
        if check and document.inputs is not None:
            theirs = self._planner.maker.ids(*document.inputs)
            if theirs != ids:
                first = next((i for i, (a, b) in enumerate(zip(theirs, ids, strict=False)) if a != b), len(ids))
                raise ConversationError(f"its ids differ from apply_chat_template's at token {first}")
        return Rendered(np.array(ids, np.int32), supervised, encoding.char_to_token(document.lead) or 0)

    def _answer(self, text: str, span: Span, encoding: Encoding, ids: list[int]) -> tuple[int, int]:
        """-> (the answer's first token, the end token)."""
        place, first = span.begin, None
        while first is None and place < len(text):  # some tokenizers leave leading spaces out of their offsets
            first, place = encoding.char_to_token(place), place + 1
        if first is None:
            raise ConversationError("no end token follows the answer")
        while first > 0 and encoding.token_to_chars(first - 1)[1] > span.begin:  # a token of nothing but such spaces
            first -= 1
        if encoding.token_to_chars(first)[0] < span.begin:
            raise ConversationError("the tokenizer joins the answer with the text around it")
        ends = [last for end in self._ends if (last := _index(ids, end, first)) is not None]
        if not ends:
            raise ConversationError("no end token follows the answer")
        last = min(ends)
        sampled = text[span.begin : encoding.token_to_chars(last)[0]]
        check_sampled(sampled, span.message, starts_special=ids[first] in self._special)
        return first, last

    def _plain(self, text: str, *, keep_end: bool) -> Rendered:
        """A text without turns: everything but its first token is learnt, and an end token closes it."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        ids = ([bos] if bos is not None else []) + ids + ([eos] if eos is not None and keep_end else [])
        supervised = np.ones(len(ids), bool)
        supervised[:1] = False
        return Rendered(np.array(ids, np.int32), supervised)


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    end_token_ids: Sequence[int],
    system_prompt: str | None = None,
    truncated: bool = False,
    check_ids: bool = False,
    tools: Sequence[dict[str, Any]] = (),
    **rules: Any,
) -> Rendered:
    """One conversation's ids and mask, as one document.

    Args:
      truncated: the last answer was cut off by a length limit: its end token is the template's, not the target's, and
        is not learnt.
      check_ids: compare with apply_chat_template(tokenize=True).
      rules: further fields of `Rules`.

    Raises:
      ConversationError: when the template refuses, rewrites history, or puts anything but the answer and one end token
        between the generation prompt and the next turn.
    """
    made = Rules(tuple(end_token_ids), system_prompt, **({"rewritten": "set_aside"} | rules))
    conversation = Conversation("", tuple(messages), truncated, tuple(tools))
    found = Renderer(tokenizer, made)([conversation], [check_ids])[0]
    if isinstance(found, ConversationError):
        raise found
    return found[0]


def _index(ids: list[int], wanted: int, start: int) -> int | None:
    try:
        return ids.index(wanted, start)
    except ValueError:
        return None
