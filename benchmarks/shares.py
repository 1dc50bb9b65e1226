"""`python -m benchmarks.shares --figure benchmarks/shares.svg`: what a draft's step costs by its supervised share.

FLOPs of W3, the draft of an 8B target, needed and counted from the jaxpr, with ever fewer supervised tokens. Nothing is
compiled. Prints JSON; the figure is a line chart of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.step import bench_of
from benchmarks.works import WORKS, make_batch
from jeagle.report import ticks

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
_WIDTH, _HEIGHT, _LEFT, _TOP = 480, 260, 56, 28  # of the plot; room beside it and above
_LINES = (("flops_counted", "counted", "#0b6bcb"), ("flops_needed", "needed", "#8a94a0"))


def shares(remat: bool) -> Iterator[dict[str, Any]]:
    for share in SHARES:
        work = dataclasses.replace(WORKS["W3"], supervised=share)
        bench = bench_of(work, make_batch(work), work.dtype, remat=remat)
        yield {"supervised": share, "slots": bench.width} | bench.flops()


def figure(found: list[dict[str, Any]]) -> str:
    """An SVG: TFLOP a step over the supervised share."""
    up = ticks(0.0, max(row[name] for row in found for name, *_ in _LINES) / 1e12)

    def x(share: float) -> float:
        return round(_LEFT + _WIDTH * share, 1)

    def y(tera: float) -> float:
        return round(_TOP + _HEIGHT * (1 - tera / up[-1]), 1)

    parts = [f'<text x="{_LEFT}" y="16">TFLOP a step of an 8B target\'s draft, by supervised share</text>']
    for tera in up:
        parts.append(f'<path d="M{_LEFT} {y(tera)}h{_WIDTH}" stroke="#d7dde3"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tera) + 4}" text-anchor="end">{tera:g}</text>')
    for row in found:
        share, below = row["supervised"], _TOP + _HEIGHT + 18
        parts.append(f'<text x="{x(share)}" y="{below}" text-anchor="middle">{share:.0%}</text>')
    for place, (name, label, colour) in enumerate(_LINES):
        points = " ".join(f"{x(row['supervised'])},{y(row[name] / 1e12)}" for row in found)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_LEFT + 12}" y="{_TOP + 18 + 18 * place}" fill="{colour}">{label}</text>')
    size = f'width="{_LEFT + _WIDTH + 24}" height="{_TOP + _HEIGHT + 32}"'
    style = 'font-family="sans-serif" font-size="13" fill="#22292f"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect {size} fill="#fff"/>\n{body}\n</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remat", action="store_true", help="with --train.remat")
    parser.add_argument("--figure", type=Path, help="an SVG to write")
    args = parser.parse_args()
    found = list(shares(args.remat))
    if args.figure:
        args.figure.write_text(figure(found), "utf-8")
    print(json.dumps({"work": "W3", "remat": args.remat, "shares": found}))


if __name__ == "__main__":
    main()
