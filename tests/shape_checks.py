"""The checker of annotations that tests/conftest.py installs on the functions of jeagle's rooms."""

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_ARRAY = re.compile(r"\b(?:Float|Int|UInt|Bool|Shaped)\d*\[")  # how jaxtyping's annotations read


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose arrays are checked against the types and shapes of its annotations when it is called.

    Other annotations are mypy's affair, so that a test may pass a double of a class that it does not need.
    """
    shapes = {
        name: hint
        for name, hint in getattr(function, "__annotations__", {}).items()
        if _ARRAY.search(hint if isinstance(hint, str) else repr(hint))
    }
    if not shapes:
        return function
    function.__annotations__ = shapes
    return beartype(function)
