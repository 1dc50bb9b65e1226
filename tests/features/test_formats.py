"""What narrow types lose, and what a token costs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jeagle import align, features
from jeagle.features.formats import DTYPES
from jeagle.joints import Batch, Features


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
    back = jax.jit(lambda f: features.decode(features.encode(f, kind, kind, scales)))(plain)
    off = (np.asarray(back.taps_BTAH) - x)[:, 1:] / x[:, 1:].std(axis=(0, 1))
    return float(np.sqrt((off**2).mean()))


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("fp8", 0.03), ("bfloat16", 0.003), ("float32", 0.0)])
def test_what_is_lost(kind, most):
    channel = features.channel_scales(stream(1).reshape(-1, 3, 128), kind)
    assert error_in_spreads(kind, channel) <= most


def test_a_byte_needs_the_scales_of_channels():
    channel = features.channel_scales(stream(1).reshape(-1, 3, 128), "int8")
    assert error_in_spreads("int8", np.ones_like(channel)) > 5 * error_in_spreads("int8", channel)


def test_what_is_zero_stays_zero():
    channel = features.channel_scales(np.zeros((5, 3, 128), np.float32), "int8")
    zero = Features(*(np.zeros(s, np.float32) for s in ((1, 4, 3, 128), (1, 4, 128), (1, 4), (1, 4))))
    back = features.decode(features.encode(zero, "int8", "int8", {"taps": channel, "last": channel[0]}))
    assert not np.asarray(back.taps_BTAH).any() and not np.asarray(back.last_BTH).any()


def test_bytes_of_an_8b_target():
    assert features.bytes_per_token(4096, 3, "int8", "int8") <= 16.25 * 1024
    assert features.bytes_per_token(4096, 3, "int8", "int8", kept=0.35) <= 13.5 * 1024
    assert features.bytes_per_token(576, 3, "int8", "int8") <= 0.51 * (4 * 576 * 2 + 16)
    assert DTYPES["int8"].itemsize == DTYPES["fp8"].itemsize == 1


def test_every_position_that_teaches_is_kept():
    """By every rule for which slots count, across documents too where that is asked for."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 5, (20, 30)), axis=1).astype(np.int32)
    segments[:, 26:] = 0
    supervised = (rng.random((20, 30)) < 0.4) & (segments > 0)
    batch = Batch(np.ones_like(segments), segments, segments, supervised)
    near = align.near_supervised(batch, xp=np)
    assert not near[segments == 0].any() and not near.all()
    for rule in align.SLOT_RULES:
        for cross in {False, rule == "speculators"}:
            counts = align.counting_slots(batch, 4, rule, cross_documents=cross, xp=np)
            reads = align.read_positions(segments, 4, cross_documents=cross, xp=np)
            assert not (align.teacher_positions(counts, reads, xp=np) & ~near).any(), rule
