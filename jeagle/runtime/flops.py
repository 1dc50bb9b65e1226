"""FLOPs of a program, counted from its jaxpr: what a compiler's own count misses in loops and kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """FLOPs of all matrix products and convolutions; a multiply-add is two, everything else counts nothing.

    A scan's body counts as often as it runs, a `while`'s once (how often it runs is not in the jaxpr), a `cond`'s
    dearest branch, a `shard_map`'s body once for each device of its axes, a Pallas kernel what it says of itself, or
    else its body once for each point of its grid, as if it skipped none. A ragged product counts every row that it is
    given, also those of no group.

    Args:
      jaxpr: from `jax.make_jaxpr(f)(*args)`.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation(equation) for equation in inner.eqns)


def flops_of(function: Callable[..., Any], *args: Any) -> int:
    """`count_flops` of a function of arrays or of `jax.ShapeDtypeStruct`s."""
    return count_flops(jax.make_jaxpr(function)(*args))


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](equation)
    parts = [count_flops(part) for part in _inner(params)]
    if name == "cond":
        return max(parts)
    if name == "scan":
        return params["length"] * sum(parts)
    if name == "shard_map":
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]  # by jax's age
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(parts)
    if name == "pallas_call":
        if estimate := params["cost_estimate"]:
            return int(estimate.flops)
        return math.prod(params["grid_mapping"].grid) * sum(parts)
    return sum(parts)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    """The jaxprs among an equation's parameters. Rules of differentiation are functions there, and do not count."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                yield part


def _dot(equation: Any) -> int:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(equation: Any) -> int:
    """[M, K] x [G, K, N]: every row meets one matrix; and [K, M] x [K, N], its contraction ragged: every k once."""
    left = equation.invars[0].aval.shape
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    out = equation.outvars[0].aval.shape
    if set(numbers.lhs_ragged_dimensions) <= set(contracted):
        out = out[1:]  # one product for each group, whose contractions together are the whole one
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """Each output is a sum over a window and the inputs of its group."""
    kernel = equation.invars[1].aval.shape
    _, inputs, *window = equation.params["dimension_numbers"].rhs_spec
    return 2 * math.prod(equation.outvars[0].aval.shape) * kernel[inputs] * math.prod(kernel[axis] for axis in window)


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
