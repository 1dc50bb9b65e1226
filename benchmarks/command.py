"""What the commands that measure a work share: their options, and the line that says on what machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

import jax

from jeagle.runtime.host import prepare_host


def options(description: str | None, works: Iterable[str], *, seconds: float, of: str) -> argparse.ArgumentParser:
    """--work, --dtype, --compile-only, --seconds, by default so many, `of` what is run, and --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=list(works), default="W1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the matrix products (default: the work's)")
    parser.add_argument("--compile-only", action="store_true", help="as for W3 on CPUs: no arrays, no times")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of {of}, to take the least of")
    parser.add_argument("--json", action="store_true", help="print nothing but JSON")
    return parser


def begin(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, by default the process's; the host is made ready, and named."""
    args = parser.parse_args(arguments)
    prepare_host()
    if not args.json:
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}", flush=True)
    return args
