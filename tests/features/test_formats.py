"""What types of one byte lose, and what a token costs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jeagle import align, features
from jeagle.features.formats import DTYPES
from jeagle.interfaces import Batch, Features, TopK

BYTES = features.StoreFormat("int8", "int8")


def stream(seed: int) -> np.ndarray:
    """[2, 64, 3, 128] like a residual stream: places of very different size, and one token that gathers attention."""
    rng = np.random.default_rng(seed)
    places = np.exp(rng.standard_normal(128) * 0.5)
    places[[3, 70]] = 300.0
    x = rng.standard_normal((2, 64, 3, 128)) * places
    x[:, 0, :, 3] = 5e4
    return x.astype(np.float32)


def error_in_spreads(kind: str, channel: np.ndarray) -> float:
    """Root mean square error in units of each place's own spread, the token that gathers attention left out."""
    x = stream(0)
    plain = Features(x, x[:, :, 0], np.zeros((2, 64), np.int32), np.zeros((2, 64), np.float32))
    scales = {"taps": channel, "last": channel[0]}
    back = jax.jit(
        lambda f: features.decode_features(features.encode_features(f, features.StoreFormat(kind, kind), scales))
    )(plain)
    off = (np.asarray(back.aux_BTAH) - x)[:, 1:] / x[:, 1:].std(axis=(0, 1))
    return float(np.sqrt((off**2).mean()))


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("fp8", 0.03), ("bfloat16", 0.003), ("float32", 0.0)])
def test_the_error_of_each_type(kind, most):
    channel = features.channel_scales(stream(1).reshape(-1, 3, 128), kind)
    assert error_in_spreads(kind, channel) <= most


def test_int8_needs_the_scales_of_channels():
    channel = features.channel_scales(stream(1).reshape(-1, 3, 128), "int8")
    assert error_in_spreads("int8", np.ones_like(channel)) > 5 * error_in_spreads("int8", channel)


def test_zeros_stay_zeros():
    channel = features.channel_scales(np.zeros((5, 3, 128), np.float32), "int8")
    zero = Features(*(np.zeros(s, np.float32) for s in ((1, 4, 3, 128), (1, 4, 128), (1, 4), (1, 4))))
    back = features.decode_features(features.encode_features(zero, BYTES, {"taps": channel, "last": channel[0]}))
    assert not np.asarray(back.aux_BTAH).any() and not np.asarray(back.teacher).any()


def test_bytes_of_an_8b_target():
    assert features.bytes_per_token(4096, 3, BYTES) <= 16.25 * 1024
    assert features.bytes_per_token(4096, 3, BYTES, teachers=0.35) <= 13.5 * 1024
    assert features.bytes_per_token(576, 3, BYTES) <= 0.51 * (4 * 576 * 2 + 16)
    assert DTYPES["int8"].itemsize == DTYPES["fp8"].itemsize == 1


def packed() -> Batch:
    """Rows of several documents, some without any answer, and padding."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 5, (20, 30)), axis=1).astype(np.int32)
    segments[:, 26:] = 0
    supervised = (rng.random((20, 30)) < 0.4) & (segments > 0)
    return Batch(np.ones_like(segments), segments, segments, supervised)


def test_every_position_that_may_teach_is_stored():
    """By every rule for which slots count, across documents too where that is asked for."""
    batch = packed()
    segments = batch.segments_BT
    near = align.near_supervised(batch, xp=np)
    assert not near[segments == 0].any() and not near.all()
    for rule in align.SLOT_RULES:
        for cross in {False, rule == "speculators"}:
            counts = align.counting_slots(batch, 4, rule, cross_documents=cross, xp=np)
            reads = align.read_positions(segments, 4, cross_documents=cross, xp=np)
            assert not (align.teacher_positions(counts, reads, xp=np) & ~near).any(), rule


def test_likeliest_tokens_are_smaller_than_states():
    for hidden, kept in ((576, 64), (4096, 256), (8192, 256)):
        ours = features.bytes_per_token(hidden, 3, features.StoreFormat("int8", top_k=kept))
        assert ours < features.bytes_per_token(hidden, 3, BYTES)


def test_log_probabilities_in_float16_move_little_mass():
    """At most 2**-11 of each token's log-probability: of all tokens together, of the distribution's entropy."""
    rng = np.random.default_rng(0)
    log_probs = np.sort(np.log(rng.dirichlet(np.full(5000, 0.05), (1, 6))), axis=-1)[..., ::-1][..., :64].astype(
        np.float32
    )
    kept, zeros = TopK(np.zeros(log_probs.shape, np.int32), log_probs, np.zeros((1, 6), np.float32)), np.zeros((1, 6))
    plain = Features(np.zeros((1, 6, 3, 8), np.float32), kept, zeros, zeros)
    back = features.decode_features(
        features.encode_features(plain, features.StoreFormat(top_k=64), {"taps": np.ones((3, 8))})
    )
    moved = np.abs(np.exp(np.asarray(back.teacher.log_probs_BTP)) - np.exp(log_probs)).sum(-1)
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    assert (moved <= 2.0**-11 * entropy * 1.01).all() and moved.max() > 2.0**-14
