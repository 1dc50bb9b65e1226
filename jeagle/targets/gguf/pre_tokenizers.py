"""How the byte-level tokenizers of GGUF files cut text before they join bytes, by tokenizer.ggml.pre.

Source: the names in llama.cpp's llama-vocab.cpp; the expressions are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from typing import NamedTuple


class Pre(NamedTuple):
    """One way of cutting.

    Attributes:
      steps: regular expressions (Oniguruma); each cuts the pieces of the one before into matches and what lies between.
      whole_words: a piece that is a token itself is taken, whatever the merges say.
      bos: a text starts with the beginning-of-text token unless the file says otherwise.
    """

    steps: tuple[str, ...]
    whole_words: bool = False
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
# Letters with a case, as DeepSeek's first tokenizer lists them.
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

_LLAMA3_PRE, _GPT2_PRE, _DIGITS_PRE = Pre((_LLAMA3,), whole_words=True, bos=True), Pre((_GPT2,)), Pre((r"\p{N}", _GPT2))
PRES: dict[str, Pre] = {
    "chatglm-bpe": Pre((_LLAMA3,)),
    "command-r": _DIGITS_PRE,
    "dbrx": Pre((_LLAMA3,)),
    "deepseek-coder": Pre(_DEEPSEEK_CODER),
    "deepseek-llm": Pre(_DEEPSEEK),
    "deepseek-r1-qwen": Pre((_QWEN2,)),
    "deepseek-v3": Pre(_DEEPSEEK3),
    "falcon3": _LLAMA3_PRE,
    "glm4": Pre((_LLAMA3,), whole_words=True),
    "gpt-2": _GPT2_PRE,
    "gpt-4o": Pre((_GPT4O,)),
    "llama-bpe": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama4": Pre((_GPT4O,)),
    "mpt": _GPT2_PRE,
    "olmo": _GPT2_PRE,
    "phi-2": _GPT2_PRE,
    "pixtral": _LLAMA3_PRE,
    "qwen2": Pre((_QWEN2,)),
    "qwen35": Pre((_QWEN35,)),
    "refact": _DIGITS_PRE,
    "smaug-bpe": Pre((_LLAMA3,)),
    "smollm": _DIGITS_PRE,
    "stablelm2": Pre((_QWEN2,)),
    "starcoder": _DIGITS_PRE,
    "tekken": Pre((_TEKKEN,), whole_words=True, bos=True),
}
