"""Tokenises texts, together with the position of every token in the text.

Tokenizers spend a fifth of their time on offsets. For byte-level BPE without a normaliser, the offsets follow from the
ids alone, because every token stands for a known number of consecutive bytes of the text.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

# Pre-tokenizers that can leave every character of a text in its place.
_CHARACTER_PRESERVING = ("ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts", "FixedLength")


Encoding = Any  # a `tokenizers.Encoding` or a `ByteEncoding`


class ByteEncoding:
    """The interface of `tokenizers.Encoding` that is used here, for tokens whose ends are known as byte positions.

    Args:
      text: the text, and `data` its UTF-8 bytes.
      ids: n token ids.
      ends: int64 [n], rising; the byte position where each token ends.
    """

    def __init__(self, text: str, data: bytes, ids: list[int], ends: Int64[np.ndarray, " n"]):
        self.ids, self._text, self._data, self._ends = ids, text, data, ends
        self._is_ascii = len(text) == len(data)

    def char_to_token(self, char_pos: int) -> int | None:
        """Returns the token that contains a character, or None beyond the end of the text."""
        byte = char_pos if self._is_ascii else len(self._text[:char_pos].encode())
        token = int(self._ends.searchsorted(byte, side="right"))
        return token if token < len(self.ids) and char_pos < len(self._text) else None

    def token_to_chars(self, token_index: int) -> tuple[int, int]:
        """Returns the range of characters of a token. A token with some bytes of a character contains all of it."""
        begin, end = int(self._ends[token_index - 1]) if token_index else 0, int(self._ends[token_index])
        if self._is_ascii:
            return begin, end
        inside = self._data[begin : begin + 1] and 0x80 <= self._data[begin] < 0xC0
        return self._characters_before(begin) - bool(inside), self._characters_before(end)

    def _characters_before(self, byte: int) -> int:
        """Counts the characters that begin before this byte."""
        before = np.frombuffer(self._data, np.uint8, byte)
        return byte - int(((before >= 0x80) & (before < 0xC0)).sum())


class Encoder:
    """Tokenises texts without adding special tokens, in the cheapest way that yields token positions.

    Args:
      backend: a `tokenizers.Tokenizer`.
    """

    def __init__(self, backend: Any):
        self._backend, self._lengths = backend, byte_lengths(backend)

    def __call__(self, texts: Sequence[str]) -> list[Encoding]:
        if self._lengths is None:
            return list(self._backend.encode_batch(texts, add_special_tokens=False))
        encodings = []
        for text, fast in zip(texts, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids, data = fast.ids, text.encode()
            ends = self._lengths[ids].cumsum()
            if (ends[-1] if len(ends) else 0) == len(data):
                encodings.append(ByteEncoding(text, data, ids, ends))
            else:  # the tokenizer adds or drops something, such as a space
                encodings.append(self._backend.encode(text, add_special_tokens=False))
        return encodings


def byte_lengths(backend: Any) -> Int64[np.ndarray, " V"] | None:
    """Returns how many bytes of the text each token stands for, or None if the tokenizer can add or drop bytes.

    It is not enough to compare the sum of the lengths with the length of the text, because a tokenizer may add as many
    bytes as it drops.
    """
    from tokenizers import models, pre_tokenizers

    model = backend.model
    is_plain_bpe = isinstance(model, models.BPE) and not (model.continuing_subword_prefix or model.end_of_word_suffix)
    if not is_plain_bpe or backend.normalizer is not None or not _only_splits_bytes(backend.pre_tokenizer):
        return None
    vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    if (model.unk_token or model.byte_fallback) and not vocabulary.keys() >= {*pre_tokenizers.ByteLevel.alphabet()}:
        return None  # a token may stand for a byte that the vocabulary lacks
    lengths = np.zeros(1 + max([*vocabulary.values(), *added], default=0), np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # byte-level BPE spells every byte as one character
    for number, token in added.items():
        if token.lstrip or token.rstrip:
            return None
        lengths[number] = len(token.content.encode())
    return lengths


def _only_splits_bytes(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer spells a text as its bytes exactly once, and otherwise only splits it."""

    def leaves(tree: dict[str, Any]) -> list[dict[str, Any]]:
        if tree["type"] != "Sequence":
            return [tree]
        return [leaf for part in tree["pretokenizers"] for leaf in leaves(part)]

    parts = leaves(json.loads(pre_tokenizer.__getstate__())) if pre_tokenizer is not None else []
    return [part["type"] for part in parts].count("ByteLevel") == 1 and all(
        part["type"] in _CHARACTER_PRESERVING and part.get("behavior") != "Removed" and not part.get("add_prefix_space")
        for part in parts
    )
