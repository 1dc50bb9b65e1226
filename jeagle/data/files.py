"""Local files -> records, one at a time, each with its place: json, jsonl, parquet and arrow, plain, .gz or .zst."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jeagle.errors import UserError

_LINES, _TREES, _TABLES = (".jsonl", ".ndjson"), (".json",), (".parquet", ".arrow")
_PACKED = (".gz", ".zst")
_CHUNK = 1 << 20
_NO_JSON = "no JSON"


class Record(NamedTuple):
    """One row of a file.

    Attributes:
      where: "file:line", or "file:row N" where a file has no lines.
      row: what it holds; None where it cannot be read.
      reason: why it cannot be read.
    """

    where: str
    row: Any
    reason: str = ""


def expand(path: str) -> list[Path]:
    """The files that a path, a folder or a glob names, sorted. UserError where there is none of a known kind."""
    named = Path(path)
    if named.is_dir():
        found = sorted(p for p in named.rglob("*") if p.is_file() and kind_of(p) and not _aside(p, named))
        if not found:
            raise UserError(f"The folder {path} holds no .jsonl, .json or .parquet files of conversations.")
        return found
    if named.is_file():
        return [named]
    found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"There is no file {path}: give a .jsonl, .json or .parquet file of conversations.")
    return found


def records(path: Path) -> Iterator[Record]:
    """The rows of one file, read as they are needed.

    Raises:
      UserError: when the file cannot be read to its end; a single row that cannot be read is a Record with a reason.
    """
    kind = kind_of(path)
    try:
        if kind is None:
            yield from _unnamed(path)
        elif kind in _TABLES:
            yield from _table(path, kind)
        elif kind in _TREES:
            yield from _tree(path)
        else:
            with open_file(path) as file:
                yield from _lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read to its end ({_said(error)}): make it again.") from error


def open_file(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked as its name says."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _CHUNK)
    return open(path, "rb")


def without_nulls(tree: Any) -> Any:
    """A table's row without what it lacks: tables give every row all the fields that any row has, null where none."""
    if isinstance(tree, dict):
        return {name: without_nulls(value) for name, value in tree.items() if value is not None}
    return [without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def kind_of(path: Path) -> str | None:
    """The suffix that tells what a file holds, compression left out; None for any other file."""
    suffix = path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix
    return suffix.lower() if suffix.lower() in (*_LINES, *_TREES, *_TABLES) else None


def _aside(path: Path, folder: Path) -> bool:
    """Hidden files, and what `datasets` writes beside its tables."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return hidden or path.name in ("dataset_info.json", "dataset_dict.json", "state.json")


def _lines(path: Path, lines: Iterator[bytes] | IO[bytes], first: int = 1) -> Iterator[Record]:
    """Bytes, so that one line that is no UTF-8 is one bad line and not a bad file."""
    for number, line in enumerate(lines, first):
        if line.strip():
            yield parse_line(f"{path}:{number}", line)


def _unnamed(path: Path) -> Iterator[Record]:
    """A file whose name does not say what it holds: JSON lines, or a UserError."""
    with open_file(path) as file:
        first = next((line for line in file if line.strip()), b"{}")
        if parse_line("", first).reason:
            raise UserError(
                f"{path} is no .jsonl, .json, .parquet or .arrow file (.gz and .zst too), and its first line is no "
                "JSON: turn it into one of them."
            )
    with open_file(path) as file:
        yield from _lines(path, file)


def parse_line(where: str, line: bytes) -> Record:
    """The JSON value of one line of UTF-8, with or without a byte order mark."""
    try:
        return Record(where, json.loads(line.decode("utf-8-sig")))
    except UnicodeError:
        return Record(where, None, "text that is no Unicode")
    except (ValueError, RecursionError):
        return Record(where, None, _NO_JSON)


def _tree(path: Path) -> Iterator[Record]:
    """A .json file: a list of rows, read piece by piece; JSON lines under another name; or one tree."""
    with open_file(path) as file:
        first = file.readline().removeprefix(codecs.BOM_UTF8)
        number = 1
        while first and not first.strip():
            first, number = file.readline(), number + 1
        if first.lstrip().startswith(b"["):
            text = io.TextIOWrapper(io.BufferedReader(_Again(first, file)), encoding="utf-8")
            yield from _items(path, text)
            return
        whole = parse_line("", first).row
        if not isinstance(whole, dict):
            whole = parse_line("", first + file.read()).row
        elif more := _to_next(file):
            yield from _lines(path, itertools.chain([first], more, file), number)
            return
    if not isinstance(whole, dict):
        raise UserError(f"{path} is no JSON: give a list of conversations, or one JSON object a line.")
    lists = [v for v in whole.values() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    is_rows = len(lists) == 1 and not {"messages", "conversations"} & whole.keys()
    for count, row in enumerate(lists[0] if is_rows else [whole], 1):
        yield Record(f"{path}:row {count}", row)


def _to_next(file: IO[bytes]) -> list[bytes]:
    """The blank lines up to one that is not, and that one; none where only blank ones are left."""
    found = []
    for line in file:
        found.append(line)
        if line.strip():
            return found
    return []


class _Again(io.RawIOBase):
    """A stream with its first bytes put back."""

    def __init__(self, first: bytes, rest: IO[bytes]):
        self._first, self._rest = first, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._first[: len(buffer)] or self._rest.read(len(buffer))
        self._first = self._first[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _items(path: Path, text: io.TextIOBase) -> Iterator[Record]:
    """The items of a JSON list, holding only a few of them at a time."""
    decoder, buffer, count, size = json.JSONDecoder(), "", 0, _CHUNK
    try:
        buffer = text.read(size).lstrip()[1:]
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            if buffer.startswith("]"):
                return
            try:
                if not buffer:
                    raise ValueError
                item, end = decoder.raw_decode(buffer)
                if end == len(buffer):
                    raise ValueError  # a number may go on
            except ValueError as error:
                more = text.read(size)
                if not more:
                    raise UserError(f"{path} is no JSON after its item {count}: make it again.") from error
                buffer, size = buffer + more, min(size * 2, 64 * _CHUNK)
                continue
            count, buffer, size = count + 1, buffer[end:], _CHUNK
            yield Record(f"{path}:row {count}", item)
    except (UnicodeError, RecursionError) as error:
        raise UserError(f"{path} is no JSON in UTF-8 after its item {count}: make it again.") from error


def _table(path: Path, kind: str) -> Iterator[Record]:
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
        raise UserError(f"{path} cannot be read after its row {count} ({_said(error)}): make it again.") from error


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
