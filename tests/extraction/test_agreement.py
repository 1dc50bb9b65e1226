"""A store is compared with its target: what is not a number does not pass."""

import pytest

from jeagle.errors import UserError
from jeagle.extraction.agreement import Agreement, check_agreement


def test_metrics_that_are_not_numbers_do_not_pass():
    check_agreement(Agreement(9, 1.0, 0.05), "S", "int8")
    with pytest.raises(UserError, match="aux hidden states are off by nan"):
        check_agreement(Agreement(9, 1.0, float("nan")), "S", "int8")
    with pytest.raises(UserError, match="does not contain this target's features"):
        check_agreement(Agreement(9, float("nan"), 0.05), "S", "int8")
