"""Reads local files row by row: .json, .jsonl, .ndjson, .parquet, .arrow and .feather, plain or with .gz or .zst.

A file is never held in memory as a whole, except a .json file that is one single object and a compressed table.
"""

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jeagle.data.sources.json_rows import CHUNK, Record, is_json_lines, read_lines, read_text
from jeagle.errors import UserError

_JSON_LINES, _JSON, _TABLES = (".jsonl", ".ndjson"), (".json",), (".parquet", ".arrow", ".feather")
_COMPRESSED = (".gz", ".zst")
_METADATA = ("dataset_info.json", "dataset_dict.json", "state.json")  # what the `datasets` library adds to its tables


def expand(path: str) -> list[Path]:
    """Lists the files that a path, a folder or a glob pattern names, sorted by name.

    Raises:
      UserError: if nothing matches, or if a folder holds no file of a supported kind.
    """
    named = Path(path)
    if named.is_dir():
        files = sorted(p for p in named.rglob("*") if p.is_file() and kind_of(p) and p.name not in _METADATA)
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(named).parts)]
        if not files:
            raise UserError(f"The folder {path} contains no .jsonl, .json or .parquet files of conversations.")
        return files
    if named.is_file():
        return [named]
    files = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(f"There is no file {path}: give a .jsonl, .json or .parquet file of conversations.")
    return files


def records(path: Path) -> Iterator[Record]:
    """Yields the rows of one file, which are read as they are needed.

    A single row that cannot be read is yielded as a `Record` with a reason. A file whose suffix is not known is read as
    JSON lines if its first line is JSON.

    Raises:
      UserError: if the file cannot be read to its end, or if its format is not supported.
    """
    kind = kind_of(path)
    try:
        if kind in _TABLES:
            yield from _table(path, kind)
            return
        with open_file(path) as file:
            lines = is_json_lines(file, lines_expected=kind not in _JSON)
        with open_file(path) as file:
            for count, record in enumerate((read_lines if lines else read_text)(path, file)):
                if kind is None and count == 0 and record.reason:
                    raise UserError(
                        f"{path} is not a .jsonl, .json, .parquet or .arrow file (optionally .gz or .zst), and its "
                        "first line is not JSON: convert it to one of these formats."
                    )
                yield record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end ({first_line(error)}): create the file again.") from error


def open_file(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file for reading bytes; a .gz or .zst file is decompressed, with all its members."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), CHUNK)
    return open(path, "rb")


def without_nulls(tree: Any) -> Any:
    """Removes null fields from a table's row, because a table gives every row all the fields that any row has."""
    if isinstance(tree, dict):
        return {name: without_nulls(value) for name, value in tree.items() if value is not None}
    return [without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def kind_of(path: Path) -> str | None:
    """Returns the suffix that says what a file holds, without compression suffixes; None if it is not supported."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() in _COMPRESSED else path.suffix
    return suffix.lower() if suffix.lower() in (*_JSON_LINES, *_JSON, *_TABLES) else None


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _table(path: Path, kind: str | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    count = 0
    try:
        plain = path.suffix.lower() not in _COMPRESSED
        # A table is read from any of its places, so that a compressed one is decompressed in memory.
        source = pyarrow.memory_map(str(path)) if plain else pyarrow.BufferReader(_read_all(path))
        if kind == ".parquet":
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1000)
        elif source.read(6) == b"ARROW1":  # the file kind, as polars and Feather write it; the other one is a stream
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        for batch in batches:
            for row in batch.to_pylist():
                count += 1
                yield Record(f"{path}:row {count}", without_nulls(row))
    except (pyarrow.ArrowException, UnicodeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read after its row {count} ({first_line(error)}): create the file again."
        ) from error


def _read_all(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()
