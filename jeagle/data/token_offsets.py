"""Texts -> token ids, with where each token lies in the text.

Tokenizers work out offsets at a fifth of the whole cost. Of byte-level BPE without a normaliser they follow from the
ids alone: each token stands for so many bytes of the text, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

KEEPERS = ("ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts", "FixedLength")
"""Pre-tokenizers that can leave every character of a text where it is."""


class Encoding(Protocol):
    """A text's tokens, as `tokenizers.Encoding` has them."""

    @property
    def ids(self) -> list[int]: ...

    def char_to_token(self, char_pos: int) -> int | None: ...

    def token_to_chars(self, token_index: int) -> tuple[int, int]: ...


class ByteEncoding:
    """The same three, of tokens that end at these bytes of the text."""

    def __init__(self, text: str, data: bytes, ids: list[int], ends: np.ndarray):
        self.ids, self._text, self._data, self._ends = ids, text, data, ends
        self._ascii = len(text) == len(data)

    def char_to_token(self, char_pos: int) -> int | None:
        byte = char_pos if self._ascii else len(self._text[:char_pos].encode())
        token = int(self._ends.searchsorted(byte, side="right"))
        return token if token < len(self.ids) and char_pos < len(self._text) else None

    def token_to_chars(self, token_index: int) -> tuple[int, int]:
        """A token of some bytes of a character has all of it."""
        begin, end = int(self._ends[token_index - 1]) if token_index else 0, int(self._ends[token_index])
        if self._ascii:
            return begin, end
        inside = self._data[begin : begin + 1] and 0x80 <= self._data[begin] < 0xC0
        return self._characters(begin) - bool(inside), self._characters(end)

    def _characters(self, byte: int) -> int:
        """How many characters begin before this byte."""
        found = np.frombuffer(self._data, np.uint8, byte)
        return byte - int(((found >= 0x80) & (found < 0xC0)).sum())


class Encoder:
    """Encodes texts, without special tokens of its own, by the cheapest way that tells where tokens lie."""

    def __init__(self, backend: Any):
        self._backend, self._lengths = backend, byte_lengths(backend)

    def __call__(self, texts: Sequence[str]) -> list[Encoding]:
        if self._lengths is None:
            return list(self._backend.encode_batch(texts, add_special_tokens=False))
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._placed(text, encoding.ids) for text, encoding in zip(texts, found, strict=True)]

    def _placed(self, text: str, ids: list[int]) -> Encoding:
        assert self._lengths is not None
        data, ends = text.encode(), self._lengths[ids].cumsum()
        if (ends[-1] if len(ends) else 0) == len(data):
            return ByteEncoding(text, data, ids, ends)
        return self._backend.encode(text, add_special_tokens=False)  # it adds or leaves out something, as a space


def byte_lengths(backend: Any) -> np.ndarray | None:
    """int64 [V]: bytes of text that each token stands for; None where a tokenizer can add or leave out any.

    The sum of the lengths alone would not show it where one adds as many as it leaves out.
    """
    from tokenizers import models

    model = backend.model
    plain = isinstance(model, models.BPE) and not (model.continuing_subword_prefix or model.end_of_word_suffix)
    if not plain or backend.normalizer is not None or not _splits_bytes(backend.pre_tokenizer):
        return None
    vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    if (model.unk_token or model.byte_fallback) and not vocabulary.keys() >= set(_alphabet()):
        return None  # a token may stand for a byte that the vocabulary lacks
    lengths = np.zeros(1 + max([*vocabulary.values(), *added], default=0), np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # its alphabet has a character for each byte
    for number, token in added.items():
        if token.lstrip or token.rstrip:
            return None
        lengths[number] = len(token.content.encode())
    return lengths


def _splits_bytes(pre_tokenizer: Any) -> bool:
    """Whether it spells a text as its bytes, once, and does no more than split it."""
    parts = list(_parts(json.loads(pre_tokenizer.__getstate__()))) if pre_tokenizer is not None else []
    keeps = (
        part["type"] in KEEPERS and part.get("behavior") != "Removed" and not part.get("add_prefix_space")
        for part in parts
    )
    return all(keeps) and [part["type"] for part in parts].count("ByteLevel") == 1


def _parts(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if tree["type"] != "Sequence":
        yield tree
    for part in tree.get("pretokenizers", ()):
        yield from _parts(part)


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()
