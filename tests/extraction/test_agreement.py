"""A store is compared with its target: what is no number does not pass."""

from types import SimpleNamespace
from typing import Any

import pytest

from jeagle.errors import UserError
from jeagle.extraction import agreement

STORE: Any = SimpleNamespace(about={"made_from": {"arrays": {"taps": "int8"}}})


def test_figures_that_are_not_numbers_do_not_pass():
    agreement.check_agreement(STORE, agreement.Agreement(9, 1.0, 0.05))
    with pytest.raises(UserError, match="aux hidden states are off by nan"):
        agreement.check_agreement(STORE, agreement.Agreement(9, 1.0, float("nan")))
    with pytest.raises(UserError, match="does not contain this target's features"):
        agreement.check_agreement(STORE, agreement.Agreement(9, float("nan"), 0.05))
