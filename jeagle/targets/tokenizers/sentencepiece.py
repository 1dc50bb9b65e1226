"""A sentencepiece vocabulary as a tokenizer of the tokenizers library, giving sentencepiece's own ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jeagle.errors import UserError
from jeagle.targets.tokenizers.sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def build_tokenizer(pieces: Pieces, added: Mapping[int, Mapping[str, Any]]) -> Tokenizer:
    """The tokenizer, without any token put before or after a text.

    Control pieces are found in text and are special; user-defined ones are found and are not. They are looked for
    first, so that none of sentencepiece's spaces comes before one that starts a text.

    Args:
      added: id -> {"content", "special", "lstrip", "rstrip", "single_word", "normalized"} of tokens that are taken
        whole too; they may replace pieces or follow them.

    Raises:
      UserError: where added tokens leave ids without a token.
    """
    from tokenizers import Tokenizer, decoders

    pieces = _with_added(pieces, added)
    tokenizer = Tokenizer(_bpe(pieces) if pieces.kind == "bpe" else _unigram(pieces))
    _prepare(tokenizer, pieces)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.space_first != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    _take_whole(tokenizer, pieces, added)
    return tokenizer


def _with_added(pieces: Pieces, added: Mapping[int, Mapping[str, Any]]) -> Pieces:
    texts, scores, types = list(pieces.texts), list(pieces.scores), list(pieces.types)
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:  # these are looked for in the text as it was written
            texts[i] = texts[i].replace(SPACE, " ")
    for i, token in sorted(added.items()):
        if i < len(texts):
            if texts[i] != token["content"] and types[i] != USER_DEFINED:
                texts[i], types[i] = token["content"], CONTROL
        elif i == len(texts):
            texts.append(token["content"])
            scores.append(0.0)
            types.append(CONTROL)
        else:
            raise UserError(
                f"The target's tokenizer_config.json adds the token {token['content']} as {i}, but no token has the id "
                f"{len(texts)}: copy the model's own files there."
            )
    return dataclasses.replace(pieces, texts=texts, scores=scores, types=types)


def _take_whole(tokenizer: Tokenizer, pieces: Pieces, added: Mapping[int, Mapping[str, Any]]) -> None:
    from tokenizers import AddedToken

    flags = ("lstrip", "rstrip", "single_word")
    for i, (text, kind) in enumerate(zip(pieces.texts, pieces.types, strict=True)):
        given = added.get(i, {})
        if not given and kind not in (CONTROL, USER_DEFINED, UNKNOWN):
            continue
        special = bool(given.get("special", kind != USER_DEFINED))
        token = AddedToken(text, normalized=False, **{flag: bool(given.get(flag, False)) for flag in flags})
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])


def _bpe(pieces: Pieces) -> Any:
    """BPE whose merges follow from the scores: of two neighbours, those whose joint piece scores best are joined."""
    from tokenizers import models

    texts, vocab = _with_letters(pieces), {}
    for i, text in enumerate(texts):
        vocab.setdefault(text, i)
    merging = {text for text, kind in zip(texts, pieces.types, strict=True) if kind == NORMAL}
    merging |= {text for text, kind in zip(texts, pieces.types, strict=True) if kind == BYTE and len(text) == 1}
    ranked = []
    for i, text in enumerate(texts):
        if text in merging and vocab[text] == i:
            splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            ranked += [(-pieces.scores[i], i, pair) for pair in splits if pair[0] in merging and pair[1] in merging]
    ranked.sort(key=lambda entry: (*entry[:2], len(entry[2][0])))
    unknown = None if pieces.unknown is None else texts[pieces.unknown]
    return models.BPE(
        vocab=vocab,
        merges=[pair for _, _, pair in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=pieces.byte_fallback,
    )


def _with_letters(pieces: Pieces) -> list[str]:
    """The texts, with ASCII letters that have no piece but are part of one put in the place of their byte's.

    Sentencepiece joins letters whether or not they are pieces themselves; the tokenizers library joins pieces only.
    """
    texts, present = list(pieces.texts), set(pieces.texts)
    needed = {letter for text in texts if len(text) > 1 for letter in text if letter.isascii()} - present
    where = {text: i for i, text in enumerate(texts)}
    for letter in sorted(needed):
        if (i := where.get(f"<0x{ord(letter):02X}>")) is not None and pieces.types[i] == BYTE:
            texts[i] = letter
    return texts


def _unigram(pieces: Pieces) -> Any:
    from tokenizers import models

    vocab = list(zip(pieces.texts, pieces.scores, strict=True))
    return models.Unigram(vocab=vocab, unk_id=pieces.unknown, byte_fallback=pieces.byte_fallback)


def _prepare(tokenizer: Tokenizer, pieces: Pieces) -> None:
    """Spaces become `SPACE`, and one comes first.

    `Metaspace` puts no space before a text that starts with one. That is right where spaces are trimmed; where they are
    kept, one of two of them puts it there, which looks for blanks after the normaliser has left none.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.trim:
        left = pieces.space_first == "never"  # otherwise the spaces there become the one that comes first
        steps += [normalizers.Strip(left=left), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    looked_for = SPACE if pieces.trim else " "
    first = pre_tokenizers.Metaspace(looked_for, prepend_scheme=pieces.space_first, split=False)
    then: list[Any] = [first, pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)]
    if pieces.kind == "unigram" and pieces.byte_fallback:  # a byte's name in a text is not that byte
        then.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(then)
