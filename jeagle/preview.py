"""`python -m jeagle.preview DATA`: prepared rows, with what is learnt coloured, and what they hold in figures.

DATA is a run's folder or the data folder in it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jeagle import data as room
from jeagle.errors import UserError
from jeagle.runtime.cli import run
from jeagle.runtime.manifest import atomic_write, finished_manifest, read_manifest
from jeagle.runtime.outputs import check_replaceable


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Shows rows of prepared data: supervised tokens coloured, documents ruled off, special tokens visible."""

    data: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or the data folder in it."""
    rows: int = 3
    """Rows shown."""
    start: int = 0
    """The first of them."""
    part: str = "train"
    """train or held_out."""
    width: int = 0
    """Characters in a line; 0 is the terminal's width."""
    html: Path | None = None
    """File to write the rows and figures to, instead of the terminal."""


def main(arguments: list[str]) -> None:
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.preview", description=__doc__)
    if args.html is not None:
        check_replaceable(args.html, room.PAGE)
    folder = data_folder(args.data)
    rows, decode = open_rows(folder, args.part)
    total = len(rows.tokens_BT)
    if not 0 <= args.start < max(total, 1):
        raise UserError(f"{folder / args.part} has {total} rows, so that there is no row {args.start}.")
    chosen = range(args.start, min(args.start + args.rows, total))
    shown = [room.pieces(rows, number, decode) for number in chosen]
    metrics = room.metrics(finished_manifest(folder), read_manifest(folder.parent / "tables"), _coverage(folder))
    if args.html is not None:
        atomic_write(args.html, room.html_page(str(args.data), args.part, list(chosen), shown, metrics), room.PAGE)
        print(f"{len(shown)} rows in {args.html}")
        return
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, pieces in zip(chosen, shown, strict=True):
        print(room.terminal_row(f"{args.part} row {number} of {total}", pieces, coloured, args.width))
    for name, value in metrics:
        print(f"{name:<24}{value}")


def data_folder(path: Path) -> Path:
    """The data folder that `path` means. UserError where there is none that is finished."""
    folder = path / "data" if (path / "data").is_dir() else path
    if read_manifest(folder) is None:
        raise UserError(f"{path} holds no prepared data: run python -m jeagle.prepare, and name the run's folder.")
    return folder


def open_rows(folder: Path, part: str):
    """(rows, a function from ids to their texts). UserError for another part than train or held_out."""
    if not (folder / part / "tokens.npy").is_file():
        raise UserError(f"{folder} has no rows called {part}: --part is train or held_out.")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} was made by an older jeagle, without its tokenizer: prepare it anew.")
    return room.load_rows(folder / part), room.token_texts(folder / "tokenizer.json")


def _coverage(folder: Path) -> float | None:
    tables = folder.parent / "tables"
    if read_manifest(tables) is None:
        return None
    return room.coverage(np.load(folder / "train" / "counts.npy"), room.load_tables(tables))


if __name__ == "__main__":
    run(main)
