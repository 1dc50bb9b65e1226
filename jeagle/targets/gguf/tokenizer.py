"""A GGUF's tokenizer, from its metadata: sentencepiece's kind, or byte-level BPE.

Source: llama.cpp's llama-vocab.cpp, which is the reference for what these keys mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jeagle.errors import UserError
from jeagle.targets.gguf.pre_tokenizers import PRES, Pre
from jeagle.targets.gguf.reader import open_gguf
from jeagle.targets.tokenizers.load import wrapped
from jeagle.targets.tokenizers.sentencepiece import build_tokenizer
from jeagle.targets.tokenizers.sentencepiece_model import BYTE, CONTROL, SPACE, UNKNOWN, USER_DEFINED, Pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
# What llama.cpp takes for granted where a file of sentencepiece's kind does not say.
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF, with its chat template.

    Raises:
      UserError: where the file has none, or one of a kind that is not supported, naming it.
    """
    header = open_gguf(path).metadata
    model, pre = header.get("tokenizer.ggml.model"), str(header.get("tokenizer.ggml.pre"))
    if not header.get("tokenizer.ggml.tokens"):
        raise UserError(f"The target {path} holds no tokenizer: put the model's tokenizer.json beside the file.")
    ids = {role: header.get(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
    if model == "llama":
        ids = {role: _DEFAULT_IDS.get(role) if i is None else i for role, i in ids.items()}
        tokenizer, bos = build_tokenizer(_pieces(header, ids["unknown"]), {}), True
    elif model == "gemma4":
        tokenizer, bos = _spaced_bpe(header), False
    elif model == "gpt2" and pre in PRES:
        tokenizer, bos = _byte_level_bpe(header, PRES[pre]), PRES[pre].bos
    else:
        raise UserError(
            f"The target {path} has a tokenizer of model {model!r} and pre {pre!r}; supported in GGUF are the models "
            f"'llama', 'gemma4', and 'gpt2' with pre {', '.join(map(repr, PRES))}: put the model's tokenizer.json and "
            "tokenizer_config.json beside the file."
        )
    tokens = header["tokenizer.ggml.tokens"]
    return wrapped(
        tokenizer,
        {short: tokens[i] for role, short in _ROLES.items() if (i := ids[role]) is not None and i < len(tokens)},
        add_bos=bool(header.get("tokenizer.ggml.add_bos_token", bos)) and model != "gemma4",
        add_eos=bool(header.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=header.get("tokenizer.chat_template"),
        longest=header.get(f"{header['general.architecture']}.context_length"),
    )


def _pieces(header: Mapping[str, Any], unknown: int | None) -> Pieces:
    """llama.cpp puts a space after every special token, and joins by scores whatever sentencepiece would do."""
    texts = header["tokenizer.ggml.tokens"]
    types = header.get("tokenizer.ggml.token_type") or [1] * len(texts)
    return Pieces(
        kind="bpe",
        texts=texts,
        scores=header.get("tokenizer.ggml.scores") or [0.0] * len(texts),
        types=types,
        byte_fallback=BYTE in types,
        space_first="always" if header.get("tokenizer.ggml.add_space_prefix", True) else "never",
        unknown=unknown,
    )


def _byte_level_bpe(header: Mapping[str, Any], pre: Pre) -> Tokenizer:
    """The file's tokens and merges over the bytes of each piece that `pre` cuts."""
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer = _bpe(header, ignore_merges=pre.whole_words)
    cuts = [pre_tokenizers.Split(Regex(step), "isolated") for step in pre.steps]
    prefix = bool(header.get("tokenizer.ggml.add_space_prefix", False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spaced_bpe(header: Mapping[str, Any]) -> Tokenizer:
    """Gemma 4's: merges over the text itself, its spaces written as sentencepiece does."""
    from tokenizers import decoders, normalizers

    tokenizer = _bpe(header, byte_fallback=True, fuse_unk=True)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _bpe(header: Mapping[str, Any], **options: bool) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, models

    tokens = header["tokenizer.ggml.tokens"]
    merges = []
    for merge in header.get("tokenizer.ggml.merges") or []:
        cut = merge.index(" ", 1)  # the first part may itself start with a space
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    whole = {CONTROL: tokenizer.add_special_tokens, UNKNOWN: tokenizer.add_special_tokens}
    whole[USER_DEFINED] = tokenizer.add_tokens
    for token, kind in zip(tokens, header.get("tokenizer.ggml.token_type") or [], strict=False):
        if kind in whole:
            whole[kind]([AddedToken(token, normalized=False)])
    return tokenizer
