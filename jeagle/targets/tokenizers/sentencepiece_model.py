"""What a sentencepiece model says: its pieces, and how text is prepared for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from jeagle.errors import UserError

# Kinds of pieces; the same numbers in sentencepiece's own files and in tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_KINDS: dict[int, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}
_OTHER_KINDS = {3: "word", 4: "char"}
SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A vocabulary and its switches.

    Attributes:
      kind: how the best pieces are found.
      texts, scores, types: of each id; spaces are written as `SPACE`.
      byte_fallback: a character without a piece becomes those of its bytes, <0x00> to <0xFF>.
      charsmap: sentencepiece's compiled table of normalisation, empty for none.
      space_first: when a space is put before a text: at its start ("first"), also after each special token ("always").
      trim: spaces at both ends fall away and runs of them become one.
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


def read_pieces(path: Path) -> Pieces:
    """A tokenizer.model.

    Raises:
      UserError: for a file that is not a sentencepiece model, or of a kind that is not supported.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"The target's {path} is not a sentencepiece model ({error}): copy the model's own.") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces or trainer.model_type not in _KINDS or trainer.treat_whitespace_as_suffix:
        what = "spaces after words" if trainer.treat_whitespace_as_suffix else _OTHER_KINDS.get(trainer.model_type)
        raise UserError(
            f"The target's {path} is not a sentencepiece model of a kind that is supported ({what or 'no pieces'}): "
            "copy the model's tokenizer.json there."
        )

    def known(i: int) -> int | None:
        return i if 0 <= i < len(model.pieces) else None

    return Pieces(
        kind=_KINDS[trainer.model_type],
        texts=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        byte_fallback=trainer.byte_fallback,
        charsmap=normalizer.precompiled_charsmap,
        space_first="first" if normalizer.add_dummy_prefix else "never",
        trim=normalizer.remove_extra_whitespaces,
        unknown=next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None),
        bos=known(trainer.bos_id),
        eos=known(trainer.eos_id),
        pad=known(trainer.pad_id),
    )
