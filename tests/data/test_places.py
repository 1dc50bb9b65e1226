"""Where tokens lie is what the tokenizer itself says, however it is found out."""

from __future__ import annotations

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from jeagle.data.places import ByteEncoding, Encoder
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
def test_places_are_the_tokenizers_own(text):
    for kind, backend in BACKENDS.items():
        assert check(backend, Encoder(backend), text) == (kind == "byte_bpe")


def test_a_tokenizer_that_adds_or_changes_something_is_asked_itself():
    text = tokenizers.Tokenizer.to_str(BACKENDS["byte_bpe"])
    adds, changes = (tokenizers.Tokenizer.from_str(text) for _ in range(2))
    adds.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=True)
    assert not check(adds, Encoder(adds), "the cat") and check(adds, Encoder(adds), " the cat")
    changes.normalizer = normalizers.Lowercase()
    assert not check(changes, Encoder(changes), "The cat")
    changes.normalizer, changes.decoder = None, decoders.Fuse()
    assert not check(changes, Encoder(changes), "the cat")
