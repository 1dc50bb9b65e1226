"""`python -m jeagle.preview DATA` shows prepared rows, with supervised tokens coloured, and statistics.

DATA is the folder of a run, or the data folder in it.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jeagle import data as room
from jeagle.data import display
from jeagle.errors import UserError
from jeagle.runtime.cli import run
from jeagle.runtime.manifest import atomic_write, check_intact, finished_manifest, read_manifest
from jeagle.runtime.outputs import check_replaceable


@dataclasses.dataclass(frozen=True)
class PreviewArguments:
    """Shows rows of prepared data: supervised tokens are coloured, and documents are separated by lines."""

    data: Annotated[Path, tyro.conf.Positional]
    """The folder of a run, or the data folder in it."""
    rows: int = 3
    """Number of rows to show."""
    start: int = 0
    """The first row to show."""
    part: str = "train"
    """train or held_out."""
    width: int = 0
    """Characters per line; 0 takes the terminal's width."""
    html: Path | None = None
    """HTML file to write, instead of showing the rows in the terminal."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(PreviewArguments, args=arguments, prog="python -m jeagle.preview", description=__doc__)
    if args.html is not None:
        check_replaceable(args.html, display.PAGE)
    folder = args.data / "data" if (args.data / "data").is_dir() else args.data
    if read_manifest(folder) is None:
        raise UserError(f"{args.data} has no prepared data: run python -m jeagle.prepare, and give the run's folder.")
    if not (folder / args.part / "tokens.npy").is_file():
        raise UserError(f"{folder} has no rows called {args.part}: --part is train or held_out.")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} was made by an older jeagle, without its tokenizer: prepare it again.")
    shown_files = (f"{args.part}/{name}.npy" for name in ("tokens", "segments", "positions", "supervised"))
    check_intact(folder, "tokenizer.json", "train/counts.npy", *shown_files)
    rows, texts = room.load_rows(folder / args.part), room.token_texts(folder / "tokenizer.json")
    total = len(rows.tokens_BT)
    if not 0 <= args.start < max(total, 1):
        raise UserError(f"{folder / args.part} has {total} rows, so there is no row {args.start}: lower --start.")
    numbers = range(args.start, min(args.start + args.rows, total))
    shown = [display.display_tokens(rows, number, texts) for number in numbers]
    tables, coverage = read_manifest(folder.parent / "tables"), None
    if tables is not None:
        counts = np.load(folder / "train" / "counts.npy")
        coverage = room.coverage(counts, room.load_tables(folder.parent / "tables"))
    statistics = display.statistics_table(finished_manifest(folder), folder, tables, coverage)
    if args.html is not None:
        page = display.html_page(str(args.data), args.part, list(numbers), shown, statistics)
        atomic_write(args.html, page, display.PAGE)
        print(f"{len(shown)} rows in {args.html}")
        return
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, tokens in zip(numbers, shown, strict=True):
        print(display.terminal_row(f"{args.part} row {number} of {total}", tokens, coloured, args.width))
    for name, value in statistics:
        print(f"{name:<24}{value}")


if __name__ == "__main__":
    run(main)
