"""Where tokens lie is what the tokenizer itself says, however it is found out."""

from __future__ import annotations

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jeagle.data.chat.token_offsets import ByteEncoding, Encoder
from tests.data.chats import KINDS, tokenizer_for

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40).map(
    lambda text: f"<|im_start|>{text}<|im_end|>the cat {text}"
)
BACKENDS = {kind: tokenizer_for("chatml", kind).backend_tokenizer for kind in KINDS}


def check(backend: tokenizers.Tokenizer, encoder: Encoder, text: str) -> bool:
    """Whether the fast way was taken."""
    [found], known = encoder([text]), backend.encode(text, add_special_tokens=False)
    assert found.ids == known.ids
    for i in range(len(known.ids)):
        assert found.token_to_chars(i) == known.token_to_chars(i), i
    for place in range(len(text) + 2):
        assert found.char_to_token(place) == known.char_to_token(place), place
    return isinstance(found, ByteEncoding)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_positions_are_the_tokenizers_own(text):
    for kind, backend in BACKENDS.items():
        assert check(backend, Encoder(backend), text) == (kind == "byte_bpe")


def byte_level(add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)


def split(behavior: str, pattern: str = " ") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(pattern, behavior)


SPLITTING = {
    "plain": byte_level(),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
    "nested": pre_tokenizers.Sequence([pre_tokenizers.Sequence([split("isolated"), byte_level()])]),
    "punctuation": pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_next"), byte_level()]),
}
ALTERING = {
    "adds a space": byte_level(add_prefix_space=True),
    "adds and drops": pre_tokenizers.Sequence([split("removed"), byte_level(add_prefix_space=True)]),
    "nested": pre_tokenizers.Sequence(
        [pre_tokenizers.Sequence([split("removed", "t")]), byte_level(add_prefix_space=True)]
    ),
    "metaspace": pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), byte_level()]),
    "whitespace": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level(add_prefix_space=True)]),
    "words": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level(add_prefix_space=True)]),
    "bert": pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), byte_level(add_prefix_space=True)]),
    "delimiter": pre_tokenizers.Sequence([pre_tokenizers.CharDelimiterSplit("t"), byte_level(add_prefix_space=True)]),
    "no punctuation": pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("removed"), byte_level(add_prefix_space=True)]
    ),
    "bytes of bytes": pre_tokenizers.Sequence([byte_level(), byte_level()]),
    "characters": split("isolated"),
}
NORMALIZING = {
    "strips and prepends": normalizers.Sequence([normalizers.Strip(), normalizers.Prepend("x")]),
    "replaces": normalizers.Replace("cat", "dog"),
    "lowercases": normalizers.Sequence([normalizers.Lowercase()]),
    "composes": normalizers.NFKC(),
}


def altered(pre_tokenizer=None, normalizer=None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(BACKENDS["byte_bpe"].to_str())
    backend.pre_tokenizer = pre_tokenizer or byte_level()
    if normalizer:
        backend.normalizer = normalizer
    return backend


MADE = [(True, altered(one)) for one in SPLITTING.values()]
MADE += [(False, altered(one)) for one in ALTERING.values()]
MADE += [(False, altered(normalizer=one)) for one in NORMALIZING.values()]
WORDS = st.lists(
    st.sampled_from(["the cat", " ", "  ", "1,23", "t", "\t", "Naïve", "ﬁ", "東京", "🙂", "<|im_end|>"]), max_size=8
)


def overlapping(encoding, begin: int, end: int) -> list[bool]:
    """Of each token, whether some of it lies between these characters."""
    places = [encoding.token_to_chars(i) for i in range(len(encoding.ids))]
    return [first < end and begin < last for first, last in places]


@settings(max_examples=60, deadline=None)
@given(words=WORDS, data=st.data())
def test_masks_from_positions_equal_masks_from_offsets(words, data):
    text = "".join(words)
    begin, end = sorted(data.draw(st.integers(0, len(text))) for _ in range(2))
    for fast, backend in MADE:
        assert check(backend, Encoder(backend), text) == fast
        [found] = Encoder(backend)([text])
        offsets = backend.encode(text, add_special_tokens=False).offsets
        assert overlapping(found, begin, end) == [first < end and begin < last for first, last in offsets]


def test_a_byte_that_the_vocabulary_lacks_may_be_any_number_of_bytes():
    model = models.BPE({"<u>": 0, "a": 1, "Ġ": 2}, [], unk_token="<u>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = byte_level()
    assert not check(backend, Encoder(backend), "xxxx a x")


def test_the_decoder_makes_no_difference():
    backend = altered()
    backend.decoder = decoders.Fuse()
    assert check(backend, Encoder(backend), "the cat")
