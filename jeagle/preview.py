"""`python -m jeagle.preview DATA` shows prepared rows, with supervised tokens coloured, and statistics.

DATA is the folder of a run, or the data folder in it. `--templates FOLDER` checks chat templates instead.
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
from jeagle.places import Place
from jeagle.runtime.cli import parse, run
from jeagle.runtime.manifest import atomic_write, check_intact, finished_manifest, read_manifest
from jeagle.runtime.outputs import check_output


@dataclasses.dataclass(frozen=True)
class PreviewArguments:
    """Shows rows of prepared data: supervised tokens are coloured, and documents are separated by lines."""

    data: Annotated[Path | None, tyro.conf.Positional] = None
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
    templates: Path | None = None
    """Folder of chat templates (Jinja files, or folders of models): shows which kinds of chats each of them renders
    rightly, refuses with what reason, or renders wrongly. The exit status is 1 if one is wrong or refuses them all."""
    target: Place = ""
    """Target whose tokenizer is used with --templates; empty for the tokenizer beside a template, or a neutral one."""


def main(arguments: list[str]) -> int:
    args = parse(PreviewArguments, arguments, program="python -m jeagle.preview", description=__doc__)
    if args.templates is not None:
        from jeagle.run import template_folder  # it imports JAX, which the rows do not need

        results = template_folder.check_folder(args.templates, args.target)
        print(*template_folder.table(results), sep="\n")
        return int(template_folder.is_wrong(results))
    if args.data is None:
        raise UserError("There is nothing to show: give the folder of a run, or --templates with a folder of them.")
    if args.html is not None:
        check_output(args.html, display.PAGE)
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
    vocabulary, coverage = None, 0.0
    if read_manifest(folder.parent / "tables") is not None:
        vocabulary = room.load_tables(folder.parent / "tables")
        coverage = room.coverage(np.load(folder / "train" / "counts.npy"), vocabulary)
    statistics = display.statistics_table(finished_manifest(folder), folder, vocabulary, coverage)
    if args.html is not None:
        page = display.html_page(str(args.data), args.part, list(numbers), shown, statistics)
        atomic_write(args.html, page, display.PAGE)
        print(f"{len(shown)} rows in {args.html}")
        return 0
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, tokens in zip(numbers, shown, strict=True):
        print(display.terminal_row(f"{args.part} row {number} of {total}", tokens, coloured, args.width))
    for name, value in statistics:
        print(f"{name:<24}{value}")
    return 0


if __name__ == "__main__":
    run(main)
