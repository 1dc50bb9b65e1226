"""A store is compared with its target: what is not a number does not pass, and rounding is no difference."""

import numpy as np
import pytest

from jeagle.errors import UserError
from jeagle.extraction.agreement import Agreement, check_agreement, near_ties


def test_metrics_that_are_not_numbers_do_not_pass():
    check_agreement(Agreement(9, 1.0, 0.05), "S", "int8")
    with pytest.raises(UserError, match="aux hidden states are off by nan"):
        check_agreement(Agreement(9, 1.0, float("nan")), "S", "int8")
    with pytest.raises(UserError, match="does not contain this target's features"):
        check_agreement(Agreement(9, float("nan"), 0.05), "S", "int8")


@pytest.mark.parametrize("hidden", [32, 512])
@pytest.mark.parametrize("error", [0.02, 0.1])
def test_rounding_excuses_the_argmaxes_that_it_changes_and_no_others(hidden, error):
    """Of a flat random target, whose likeliest tokens are nearly equally likely."""
    rng = np.random.default_rng(0)
    x_NH, head_VH = (rng.standard_normal((n, hidden)).astype(np.float32) for n in (1000, 4000))
    noise_NH = error * np.linalg.norm(x_NH, axis=1, keepdims=True) / np.sqrt(hidden) * rng.standard_normal(x_NH.shape)
    own_N, rounded_N = (x @ head_VH.T for x in (x_NH, x_NH + noise_NH.astype(np.float32)))
    own_N, rounded_N = own_N.argmax(axis=1), rounded_N.argmax(axis=1)
    assert (own_N != rounded_N).mean() > 0.01
    assert near_ties(x_NH, head_VH, own_N, rounded_N, error).all()
    assert near_ties(x_NH, head_VH, own_N, np.roll(own_N, 1), error).mean() < 0.02  # those of other hidden states
