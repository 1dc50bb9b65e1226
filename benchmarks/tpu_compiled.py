"""What the TPU compiler says of a program: its cycles and the bytes that travel between chips, loops taken apart.

The compiler counts a loop's body once. So the programs measured here have none: every scan is unrolled, and
products with sharded weights gather them first, where they would otherwise become loops of their own around a ring.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

_NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (\(?[a-z0-9]+\[.*?) ({_KINDS})(?:-start)?\(.*?channel_id=(\d+)(.*)")

_UNKNOWN = 2**62  # cycles of instructions of which the compiler has no estimate: the largest number there is


@dataclasses.dataclass(frozen=True)
class Parts:
    """Of one chip: cycles of everything but kernels, and bytes that it receives from others."""

    cycles: float = 0.0
    link_bytes: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.cycles + other.cycles, self.link_bytes + other.link_bytes)

    def __sub__(self, other: Parts) -> Parts:
        return self + other * -1

    def __mul__(self, times: float) -> Parts:
        return Parts(self.cycles * times, self.link_bytes * times)


def compiled(run: Callable[..., Any], args: Any, shardings: Any = None, options: dict[str, str] | None = None) -> Any:
    """`run` compiled for the devices that `args`, shapes, are sharded over."""
    return jax.jit(run, out_shardings=shardings).lower(*args).compile(compiler_options=options)


def parts_of(run: Callable[..., Any], *args: Any) -> Parts:
    """Cycles and link bytes of `run`, all its loops unrolled."""
    closed = jax.make_jaxpr(run)(*args)
    flat = ClosedJaxpr(_unrolled(closed.jaxpr), closed.consts)
    text = compiled(jaxpr_as_fun(flat), jax.tree.leaves(args), options=_NO_RINGS).as_text()
    if re.search(r" while\(", text):
        raise AssertionError("a loop is left, whose body would count once")
    cycles = [int(found) for found in re.findall(r'estimated_cycles":"(\d+)"', text)]
    return Parts(float(sum(c for c in cycles if c < _UNKNOWN)), link_bytes(text))


def _unrolled(jaxpr: Jaxpr) -> Jaxpr:
    """The program with every scan told to be unrolled in full."""

    def part(value: Any) -> Any:
        if isinstance(value, Jaxpr):
            return _unrolled(value)
        if isinstance(value, ClosedJaxpr):
            return ClosedJaxpr(_unrolled(value.jaxpr), value.consts)
        return value

    def one(equation: Any) -> Any:
        params = {name: part(value) for name, value in equation.params.items()}
        if equation.primitive.name == "scan":
            params["unroll"] = params["length"]
        return equation.replace(params=params)

    return jaxpr.replace(eqns=[one(equation) for equation in jaxpr.eqns])


def link_bytes(text: str) -> float:
    """Bytes that a chip receives in a compiled program's collectives, each of which has one channel."""
    found: dict[str, float] = {}
    for result, kind, channel, rest in _COLLECTIVE.findall(text):
        size, chips = _size(result), _group_size(rest)
        moved = {
            "all-gather": size * (chips - 1) / chips,
            "all-to-all": size * (chips - 1) / chips,
            "all-reduce": 2 * size * (chips - 1) / chips,
            "reduce-scatter": size * (chips - 1),
            "collective-permute": size,
        }
        found[channel] = max(found.get(channel, 0.0), moved[kind])
    return sum(found.values())


def _size(shape: str) -> float:
    """Bytes of the largest array in a printed shape: of a pair of operand and result, the whole one."""
    sizes = (
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shape)
    )
    return float(max(sizes))


def _group_size(rest: str) -> int:
    """How many chips take part: of `mesh['axis_0'=8,'axis_1'=1] {'axis_0'}`, `[4,8]<=[32]` or `{{0,1},{2,3}}`."""
    groups = rest[rest.find("replica_groups=") :]
    if named := re.match(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if iota := re.match(r"replica_groups=\[\d+,(\d+)\]", groups):
        return int(iota[1])
    listed = re.match(r"replica_groups=\{\{([\d,]+)\}", groups)
    return len(listed[1].split(",")) if listed else 2
