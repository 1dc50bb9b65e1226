"""The tokenizer of a GGUF, of sentencepiece's kind or byte-level BPE, from the file's metadata.

transformers has a converter too (integrations/gguf), but it needs torch to read a file, and its ids differ from
llama.cpp's for 12 of the 30 kinds in tests/goldens/gguf, among them SmolLM's, GLM-4's, DeepSeek's and sentencepiece's.

Source: llama.cpp's llama-vocab.cpp, which defines the meaning of the metadata keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jeagle.errors import UserError
from jeagle.targets.gguf.reader import open_gguf
from jeagle.targets.tokenizers.load import wrap_tokenizer
from jeagle.targets.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceVocabulary,
    build_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


class PreTokenizer(NamedTuple):
    """How a byte-level tokenizer splits text before it merges bytes.

    Attributes:
      steps: regular expressions (Oniguruma); each splits the pieces of the step before into matches and the rest.
      ignore_merges: a piece that is itself a token becomes that token, whatever the merges are.
      bos: a text starts with the beginning-of-text token unless the file says otherwise.
    """

    steps: tuple[str, ...]
    ignore_merges: bool = False
    bos: bool = False


_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}|{_SIGNS}"
_GPT4O = rf"{_WORDS[0]}{_ENDING}?|{_WORDS[1]}{_ENDING}?|\p{{N}}{{1,3}}|{_SIGNS}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES,
)
_DEEPSEEK_SCRIPTS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with an upper or lower case, as DeepSeek's first tokenizer lists them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376-\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183-\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2-\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _DEEPSEEK_SCRIPTS,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_SCRIPTS, r"\p{N}")

# By tokenizer.ggml.pre. The names are those of llama.cpp's llama-vocab.cpp; the expressions are those of the models'
# own tokenizer.json.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: pre
    for names, pre in {
        "chatglm-bpe dbrx smaug-bpe": PreTokenizer((_LLAMA3,)),
        "command-r refact smollm starcoder": PreTokenizer((r"\p{N}", _GPT2)),
        "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
        "deepseek-llm": PreTokenizer(_DEEPSEEK),
        "deepseek-r1-qwen qwen2 stablelm2": PreTokenizer((_QWEN2,)),
        "deepseek-v3": PreTokenizer(_DEEPSEEK3),
        "falcon3 llama-bpe llama-v3 llama3 pixtral": PreTokenizer((_LLAMA3,), ignore_merges=True, bos=True),
        "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True),
        "gpt-2 mpt olmo phi-2": PreTokenizer((_GPT2,)),
        "gpt-4o llama4": PreTokenizer((_GPT4O,)),
        "qwen35": PreTokenizer((_QWEN35,)),
        "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, bos=True),
    }.items()
    for name in names.split()
}


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a GGUF, with its chat template.

    Raises:
      UserError: if the file has no tokenizer, or one of a kind that is not supported.
    """
    header = open_gguf(path).metadata
    model, pre = header.get("tokenizer.ggml.model"), str(header.get("tokenizer.ggml.pre"))
    if not (tokens := header.get("tokenizer.ggml.tokens")):
        raise UserError(f"The target {path} holds no tokenizer: put the model's tokenizer.json beside the file.")
    ids = {role: header.get(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
    if model == "llama":
        defaults = {"bos": 1, "eos": 2, "unknown": 0, "padding": None}  # llama.cpp's
        ids = {role: defaults[role] if i is None else i for role, i in ids.items()}
        types = header.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        # llama.cpp puts a space after every special token, and always merges by scores.
        vocabulary = SentencePieceVocabulary(
            kind="bpe",
            texts=tokens,
            scores=header.get("tokenizer.ggml.scores") or [0.0] * len(tokens),
            types=types,
            byte_fallback=BYTE in types,
            space_first="always" if header.get("tokenizer.ggml.add_space_prefix", True) else "never",
            unknown=ids["unknown"],
        )
        tokenizer, bos = build_tokenizer(vocabulary, {}), True
    elif model == "gemma4":
        tokenizer, bos = _bpe(header, None), False
    elif model == "gpt2" and pre in PRE_TOKENIZERS:
        tokenizer, bos = _bpe(header, PRE_TOKENIZERS[pre]), PRE_TOKENIZERS[pre].bos
    else:
        raise UserError(
            f"The target {path} has a tokenizer of model {model!r} and pre {pre!r}; supported in GGUF are the models "
            f"'llama', 'gemma4', and 'gpt2' with pre {', '.join(map(repr, sorted(PRE_TOKENIZERS)))}: put the model's "
            "tokenizer.json and tokenizer_config.json beside the file."
        )
    return wrap_tokenizer(
        tokenizer,
        {short: tokens[i] for role, short in _ROLES.items() if (i := ids[role]) is not None and i < len(tokens)},
        add_bos=bool(header.get("tokenizer.ggml.add_bos_token", bos)) and model != "gemma4",
        add_eos=bool(header.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=header.get("tokenizer.chat_template"),
        longest=header.get(f"{header['general.architecture']}.context_length"),
    )


def _bpe(header: Mapping[str, Any], pre: PreTokenizer | None) -> Tokenizer:
    """The file's tokens and merges, applied to the bytes of each piece of a text that `pre` splits.

    Without `pre`, as in Gemma 4's files, characters are merged instead of bytes, with sentencepiece's spelling of
    spaces.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = header["tokenizer.ggml.tokens"]
    merges = []
    for merge in header.get("tokenizer.ggml.merges") or []:
        cut = merge.index(" ", 1)  # the first part may itself start with a space
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
    options = {"ignore_merges": pre.ignore_merges} if pre else {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    add = {CONTROL: tokenizer.add_special_tokens, UNKNOWN: tokenizer.add_special_tokens}
    add[USER_DEFINED] = tokenizer.add_tokens
    for token, kind in zip(tokens, header.get("tokenizer.ggml.token_type") or [], strict=False):
        if kind in add:
            add[kind]([AddedToken(token, normalized=False)])
    if pre:
        splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in pre.steps]
        prefix = bool(header.get("tokenizer.ggml.add_space_prefix", False))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
