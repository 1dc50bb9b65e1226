"""FLOPs of a program, counted from its jaxpr (compilers miss those of loops and kernels), and how fast chips are."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Dense bfloat16 products, TFLOP/s a device, by how JAX names the device; the first name that is part of it counts.
# Source: the makers' data sheets; without sparsity.
PEAKS: dict[str, float] = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "TPU7x": 2307.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


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
    # The jaxprs among the parameters. Rules of differentiation are functions there, and do not count.
    values = [part for value in params.values() for part in (value if isinstance(value, tuple | list) else (value,))]
    parts = [count_flops(part) for part in values if isinstance(part, Jaxpr | ClosedJaxpr)]
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


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device of this kind in bfloat16; None where it is not known, as for a CPU."""
    return next((1e12 * peak for name, peak in PEAKS.items() if name.lower() in device_kind.lower()), None)


def all_devices_flops() -> float | None:
    """FLOP/s of all devices of the run together; None where theirs is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
