"""Tokenizers of sentencepiece vocabularies, built with the tokenizers library; they give sentencepiece's own ids.

transformers has a converter too, but its ids differ from sentencepiece's, as at spaces that start a text: of the 329
texts in tests/targets/tokenizers/test_sentencepiece.py they differ in 44 for a Llama-like BPE vocabulary, and in 4 to
248 for the other kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jeagle.errors import UserError
from jeagle.targets.checkpoint.weights import read_json
from jeagle.targets.tokenizers.load import chat_templates, wrap_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Types of pieces, with the same numbers in sentencepiece's files and in tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # sentencepiece's spelling of a space
_KINDS: dict[int, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """A sentencepiece vocabulary and how texts are prepared for it.

    Attributes:
      kind: the algorithm that splits a text into pieces.
      texts, scores, types: of the piece of each id; spaces are spelled as `SPACE`.
      byte_fallback: a character without a piece becomes the pieces of its bytes, <0x00> to <0xFF>.
      charsmap: sentencepiece's compiled table of normalisation; empty = none.
      space_first: where a space is inserted: before a text ("first"), also after each special token ("always"), or
        nowhere ("never").
      trim: spaces at both ends are removed, and several spaces in a row become one.
      unknown, bos, eos, pad: ids, or None.
    """

    kind: Literal["unigram", "bpe"]
    texts: list[str]
    scores: list[float]
    types: list[int]
    byte_fallback: bool = True
    charsmap: bytes = b""
    space_first: Literal["first", "always", "never"] = "first"
    trim: bool = False
    unknown: int | None = 0
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def read_vocabulary(path: Path) -> SentencePieceVocabulary:
    """Reads a tokenizer.model.

    Raises:
      UserError: for a file that is not a sentencepiece model, or is one of a kind that is not supported.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # the class is made on import
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"The target's {path} is not a sentencepiece model ({error}): copy the model's own.") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces or trainer.model_type not in _KINDS or trainer.treat_whitespace_as_suffix:
        kind = {3: "word", 4: "char"}.get(trainer.model_type)
        what = "spaces after words" if trainer.treat_whitespace_as_suffix else kind
        raise UserError(
            f"The target's {path} is not a sentencepiece model of a kind that is supported ({what or 'no pieces'}): "
            "copy the model's tokenizer.json there."
        )

    def id_or_none(i: int) -> int | None:
        return i if 0 <= i < len(model.pieces) else None

    return SentencePieceVocabulary(
        kind=_KINDS[trainer.model_type],
        texts=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        byte_fallback=trainer.byte_fallback,
        charsmap=normalizer.precompiled_charsmap,
        space_first="first" if normalizer.add_dummy_prefix else "never",
        trim=normalizer.remove_extra_whitespaces,
        unknown=next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None),
        bos=id_or_none(trainer.bos_id),
        eos=id_or_none(trainer.eos_id),
        pad=id_or_none(trainer.pad_id),
    )


def sentencepiece_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a folder that has a tokenizer.model and no tokenizer.json.

    The added tokens, the roles of special tokens and the chat template are those of tokenizer_config.json and the files
    beside it.

    Raises:
      UserError: for files that are damaged or of a kind that is not supported.
    """

    def optional(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = optional("special_tokens_map.json") | optional("tokenizer_config.json")
    vocabulary = read_vocabulary(folder / "tokenizer.model")
    # `legacy` inserts a space after every special token too; `add_prefix_space` false inserts none.
    if vocabulary.space_first != "never":
        first: Literal["first", "always", "never"]
        first = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
        vocabulary = dataclasses.replace(vocabulary, space_first=first)
    # Older folders have their added tokens in a file of their own.
    added = {int(i): {"content": text, "special": False} for text, i in optional("added_tokens.json").items()}
    added |= {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad, "unk": vocabulary.unknown}
    roles: dict[str, Any] = {role: vocabulary.texts[i] for role, i in ids.items() if i is not None}
    roles |= {role: config[f"{role}_token"] for role in ids if f"{role}_token" in config}
    roles = {role: token.get("content") if isinstance(token, dict) else token for role, token in roles.items()}
    return wrap_tokenizer(
        build_tokenizer(vocabulary, added),
        {role: text for role, text in roles.items() if text},
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
        chat_template=chat_templates(folder),
        longest=config.get("model_max_length"),
    )


def build_tokenizer(vocabulary: SentencePieceVocabulary, added: Mapping[int, Mapping[str, Any]]) -> Tokenizer:
    """Builds a tokenizer that adds no tokens before or after a text.

    Control pieces (special tokens) and user-defined pieces (not special) are matched in the text before it is split, so
    that sentencepiece inserts no space before one that starts a text.

    Args:
      added: id -> {"content", "special", "lstrip", "rstrip", "single_word", "normalized"} of further tokens that are
        matched in the text; they replace pieces or come after them.

    Raises:
      UserError: where added tokens leave ids without a token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = _with_added(vocabulary, added)
    if vocabulary.kind == "bpe":
        tokenizer = Tokenizer(_bpe(vocabulary))
    else:
        vocab = list(zip(vocabulary.texts, vocabulary.scores, strict=True))
        unigram = models.Unigram(vocab=vocab, unk_id=vocabulary.unknown, byte_fallback=vocabulary.byte_fallback)
        tokenizer = Tokenizer(unigram)
    before: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.trim:
        left = vocabulary.space_first == "never"  # otherwise they become the inserted space
        before += [normalizers.Strip(left=left), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    # `Metaspace` inserts no space before a text that starts with one, which is right only where spaces are trimmed.
    # Otherwise a first `Metaspace` inserts it: it looks for blanks, of which the normaliser has left none.
    looked_for = SPACE if vocabulary.trim else " "
    first = pre_tokenizers.Metaspace(looked_for, prepend_scheme=vocabulary.space_first, split=False)
    splits: list[Any] = [first, pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)]
    if vocabulary.kind == "unigram" and vocabulary.byte_fallback:  # the name of a byte in a text is not that byte
        splits.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    after += [decoders.Strip(content=" ", left=1)] if vocabulary.space_first != "never" else []
    tokenizer.decoder = decoders.Sequence(after)
    for i, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True)):
        given = added.get(i, {})
        if given or kind in (CONTROL, USER_DEFINED, UNKNOWN):
            flags = {flag: bool(given.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word")}
            special = bool(given.get("special", kind != USER_DEFINED))
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(text, normalized=False, **flags)])
    return tokenizer


def _with_added(vocabulary: SentencePieceVocabulary, added: Mapping[int, Mapping[str, Any]]) -> SentencePieceVocabulary:
    """The vocabulary with the added tokens, and user-defined pieces as they stand in a text."""
    scores, types = list(vocabulary.scores), list(vocabulary.types)
    pieces = zip(vocabulary.texts, types, strict=True)
    texts = [text.replace(SPACE, " ") if kind == USER_DEFINED else text for text, kind in pieces]
    for i, token in sorted(added.items()):
        if i > len(texts):
            raise UserError(
                f"The target's tokenizer_config.json adds the token {token['content']} as {i}, but no token has the id "
                f"{len(texts)}: copy the model's own files there."
            )
        if i == len(texts):
            texts.append(token["content"])
            scores.append(0.0)
            types.append(CONTROL)
        elif texts[i] != token["content"] and types[i] != USER_DEFINED:
            texts[i], types[i] = token["content"], CONTROL
    return dataclasses.replace(vocabulary, texts=texts, scores=scores, types=types)


def _bpe(vocabulary: SentencePieceVocabulary) -> Any:
    """BPE with merges that follow from the scores: neighbours whose joint piece scores best are merged first."""
    from tokenizers import models

    texts, present = list(vocabulary.texts), set(vocabulary.texts)
    # Sentencepiece merges ASCII letters whether or not they are pieces themselves; the tokenizers library merges only
    # pieces, so that missing letters take the places of the pieces of their bytes.
    needed = {letter for text in texts if len(text) > 1 for letter in text if letter.isascii()} - present
    where = {text: i for i, text in enumerate(texts)}
    for letter in sorted(needed):
        if (i := where.get(f"<0x{ord(letter):02X}>")) is not None and vocabulary.types[i] == BYTE:
            texts[i] = letter
    vocab: dict[str, int] = {}
    for i, text in enumerate(texts):
        vocab.setdefault(text, i)
    kinds = zip(texts, vocabulary.types, strict=True)
    merging = {text for text, kind in kinds if kind == NORMAL or (kind == BYTE and len(text) == 1)}
    ranked = []
    for i, text in enumerate(texts):
        if text in merging and vocab[text] == i:
            splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            ranked += [(-vocabulary.scores[i], i, pair) for pair in splits if pair[0] in merging and pair[1] in merging]
    ranked.sort(key=lambda entry: (*entry[:2], len(entry[2][0])))
    return models.BPE(
        vocab=vocab,
        merges=[pair for _, _, pair in ranked],
        unk_token=None if vocabulary.unknown is None else texts[vocabulary.unknown],
        fuse_unk=True,
        byte_fallback=vocabulary.byte_fallback,
    )
