"""The checker of annotations that tests/conftest.py installs on jeagle's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintException


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose arguments and results are checked against its annotations when it is called.

    A function whose annotations cannot be checked at run time is left as it is: protocols that are not
    runtime-checkable, and `Self` in a method whose class is not decorated.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        return function
