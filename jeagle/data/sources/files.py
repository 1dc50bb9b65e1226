"""Reads local files row by row: .json, .jsonl, .ndjson, .parquet and .arrow, plain or compressed with .gz or .zst.

Every row carries its place (file and line), so that a message about a bad row can name it. A file is never held in
memory as a whole, except a .json file that is one single object.
"""

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.errors import UserError
from jeagle.places import expanded

_JSON_LINES, _JSON, _TABLES = (".jsonl", ".ndjson"), (".json",), (".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")
_METADATA = ("dataset_info.json", "dataset_dict.json", "state.json")  # what the `datasets` library adds to its tables
_CHUNK = 1 << 20  # characters of a long JSON list that are read at a time


class Record(NamedTuple):
    """One row of a file.

    Attributes:
      where: "file:line", or "file:row N" for formats that have no lines.
      row: the parsed value; None if the row cannot be read.
      reason: why the row cannot be read; empty if it can.
    """

    where: str
    row: Any
    reason: str = ""


def expand(path: str) -> list[Path]:
    """Lists the files that a path, a folder or a glob pattern names, sorted by name.

    Raises:
      UserError: if nothing matches, or if a folder holds no file of a supported kind.
    """
    named = Path(path := expanded(path))
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
        elif kind in _JSON:
            yield from _json_file(path)
        else:
            with open_file(path) as file:
                for count, record in enumerate(_json_lines(path, file)):
                    if kind is None and count == 0 and record.reason:
                        raise UserError(
                            f"{path} is not a .jsonl, .json, .parquet or .arrow file (optionally .gz or .zst), and its "
                            "first line is not JSON: convert it to one of these formats."
                        )
                    yield record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end ({first_line(error)}): create the file again.") from error


def open_file(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file for reading bytes; a .gz or .zst file is decompressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _CHUNK)
    return open(path, "rb")


def without_nulls(tree: Any) -> Any:
    """Removes null fields from a table's row, because a table gives every row all the fields that any row has."""
    if isinstance(tree, dict):
        return {name: without_nulls(value) for name, value in tree.items() if value is not None}
    return [without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def kind_of(path: Path) -> str | None:
    """Returns the suffix that says what a file holds, without compression suffixes; None if it is not supported."""
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
    return suffix.lower() if suffix.lower() in (*_JSON_LINES, *_JSON, *_TABLES) else None


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    """Parses lines as bytes, so that one line that is not UTF-8 is one bad row and not a bad file."""
    for number, line in enumerate(lines, 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield _parse_line(f"{path}:{number}", line)


def _parse_line(where: str, line: bytes) -> Record:
    """Parses the JSON value of one line of UTF-8, with or without a byte order mark."""
    try:
        return Record(where, json.loads(line.decode("utf-8-sig")))
    except UnicodeError:
        return Record(where, None, "the text is not valid Unicode")
    except (ValueError, RecursionError):
        return Record(where, None, "the line is not valid JSON")


def _json_file(path: Path) -> Iterator[Record]:
    """Reads a .json file: a list of rows (read in pieces), JSON lines in spite of the suffix, or one object."""
    with open_file(path) as file:
        lines = (line for line in file if line.removeprefix(codecs.BOM_UTF8).strip())
        first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
        if first.lstrip().startswith(b"["):
            with open_file(path) as again:
                yield from _list_items(path, io.TextIOWrapper(again, encoding="utf-8-sig"))
            return
        tree = _parse_line("", first).row
        if not isinstance(tree, dict):
            tree = _parse_line("", first + file.read()).row
        elif next(lines, None):
            with open_file(path) as again:
                yield from _json_lines(path, again)
            return
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not valid JSON: give a list of conversations, or one JSON object per line.")
    lists = [v for v in tree.values() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    is_list_of_rows = len(lists) == 1 and not {"messages", "conversations"} & tree.keys()
    for count, row in enumerate(lists[0] if is_list_of_rows else [tree], 1):
        yield Record(f"{path}:row {count}", row)


def _list_items(path: Path, text: io.TextIOBase) -> Iterator[Record]:
    """Yields the items of a JSON list, of which only a few are in memory at a time."""
    decoder, buffer, count, size = json.JSONDecoder(), "", 0, _CHUNK
    try:
        while not buffer:
            buffer = text.read(size).lstrip()
        buffer = buffer[1:]  # the bracket that opens the list
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            if buffer.startswith("]"):
                return
            try:
                if not buffer:
                    raise ValueError
                item, end = decoder.raw_decode(buffer)
                if end == len(buffer):
                    raise ValueError  # a number may continue in the next chunk
            except ValueError as error:
                more = text.read(size)
                if not more:
                    raise UserError(f"{path} is not valid JSON after its item {count}: create it again.") from error
                buffer, size = buffer + more, min(size * 2, 64 * _CHUNK)
                continue
            count, buffer, size = count + 1, buffer[end:], _CHUNK
            yield Record(f"{path}:row {count}", item)
    except (UnicodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON in UTF-8 after its item {count}: create it again.") from error


def _table(path: Path, kind: str | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    count = 0
    try:
        if kind == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        for batch in batches:
            for row in batch.to_pylist():
                count += 1
                yield Record(f"{path}:row {count}", without_nulls(row))
    except (pyarrow.ArrowException, UnicodeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read after its row {count} ({first_line(error)}): create the file again."
        ) from error
