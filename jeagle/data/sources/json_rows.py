"""Reads rows from JSON in whatever way it is stored: lines, lists, objects one after another, and tables as one object.

Every row carries its place (file and line), so that a message about a bad row can name it.
"""

import codecs
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.data.sources.columns import NAMES
from jeagle.errors import UserError

CHUNK = 1 << 20  # characters of a long JSON text that are read at a time
_SPACE = " \t\r\n\ufeff"  # a byte order mark stands wherever files were joined that begin with one
_DECODER = json.JSONDecoder()
_KNOWN = {name for kind in ("chat", "prompt", "answer", "text", "ids") for name in NAMES[kind]} - {"data"}


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


def is_json_lines(file: gzip.GzipFile | io.BufferedReader, *, lines_expected: bool) -> bool:
    """Whether JSON is stored as one row per line, and not as one text over many lines.

    Args:
      lines_expected: whether the file's name says so, so that one bad line does not change the answer.
    """
    lines = (line for line in file if _without_mark(line).strip())
    first = next(lines, b"")
    begin = _without_mark(first).lstrip()[:1]
    if begin not in (b"{", b"["):
        return lines_expected
    if begin == b"[" and len(first) > CHUNK:
        return False
    rows = [record for line in (first, *itertools.islice(lines, 1)) for record in _parse_line("", line)]
    if lines_expected:
        return not all(record.reason for record in rows)
    is_list_of_rows = begin == b"[" and not (isinstance(rows[0].row, dict) and [*rows[0].row] == ["messages"])
    return len(rows) > 1 and not rows[0].reason and not is_list_of_rows


def read_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    r"""Parses lines as bytes, so that one line that is not UTF-8 is one bad row and not a bad file.

    Iterating over bytes ends lines at \n alone. JSON allows U+2028 and other separators inside of a text.
    """
    for number, line in enumerate(lines, 1):
        if _without_mark(line).strip():
            yield from _parse_line(f"{path}:{number}", line)


def read_text(path: Path, file: gzip.GzipFile | io.BufferedReader) -> Iterator[Record]:
    """Reads lists of rows and objects, one after another, of which only a few rows are in memory at a time.

    A single object may be a row, or hold all rows of a table.

    Raises:
      UserError: if the text is not valid JSON to its end; the message names the line.
    """
    values = _values(path, io.TextIOWrapper(file, encoding="utf-8-sig"))
    first = list(itertools.islice(values, 2))
    if len(first) == 1 and isinstance(first[0], dict):
        first = _unwrapped(first[0])
    for count, row in enumerate(itertools.chain(first, values), 1):
        yield Record(f"{path}:row {count}", {"messages": row} if _all(row, _is_turn) else row)


def _without_mark(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8)


def _parse_line(where: str, line: bytes) -> Iterator[Record]:
    """Parses the JSON of one line of UTF-8: one value, or several objects without a line break between them."""
    rows: list[Any] = []
    try:
        rest = line.decode().strip(_SPACE)
        while rest:
            row, end = _DECODER.raw_decode(rest)
            rows.append(row)
            rest = rest[end:].lstrip(_SPACE)
            if rest and not isinstance(row, dict | list):
                raise ValueError
    except UnicodeError:
        yield Record(where, None, "the text is not valid Unicode")
        return
    except (ValueError, RecursionError):  # objects before the damage may be parts of another row
        yield Record(where, None, "the line is not valid JSON")
        return
    for value in rows:
        if _all(value, _is_turn):
            yield Record(where, {"messages": value})
        else:
            yield from (Record(where, row) for row in (value if _all(value, _is_object) else [value]))


def _values(path: Path, text: io.TextIOBase) -> Iterator[Any]:
    """Yields the values of a JSON text and the items of its lists."""
    buffer, count, size, line, in_list, ended = "", 0, CHUNK, 1, False, False
    turns: list[Any] = []  # of a list that is one conversation
    try:
        while True:
            stripped = buffer.lstrip(_SPACE + "," * in_list)
            line += buffer.count("\n", 0, len(buffer) - len(stripped))
            buffer = stripped
            if buffer[:1] == ("]" if in_list else "["):
                if turns:
                    yield turns
                in_list, buffer, turns = not in_list, buffer[1:], []
                continue
            try:
                value, end = _DECODER.raw_decode(buffer)
                if end == len(buffer) and (in_list or not isinstance(value, dict)) and not ended:
                    raise json.JSONDecodeError("a number may continue in the next chunk", buffer, end)
            except json.JSONDecodeError as error:
                more = "" if error.pos < len(buffer) - 16 and not error.msg.startswith("Untermin") else text.read(size)
                if more or (buffer and not ended and error.pos == len(buffer)):
                    buffer, size, ended = buffer + more, min(size * 2, 64 * CHUNK), not more
                    continue
                if buffer or in_list or not count:
                    raise UserError(
                        f"{path} is not valid JSON after its row {count}, in line {line}: correct it there, or create "
                        "the file again."
                    ) from error
                return
            line += buffer.count("\n", 0, end)
            count, buffer, size = count + 1, buffer[end:], CHUNK
            if in_list and _is_turn(value):
                turns.append(value)
            else:
                yield value
    except (UnicodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON in UTF-8 after its row {count}: create it again.") from error


def _unwrapped(tree: dict[str, Any]) -> list[Any]:
    """Returns the rows of an object that holds a table, as pandas and datasets write it, or else the object itself."""
    lists = [value for value in tree.values() if _all(value, _is_object)]
    if len(lists) == 1 and not _all(lists[0], _is_turn) and not {"messages", "conversations"} & tree.keys():
        return lists[0]
    names, data = tree.get("columns"), tree.get("data")
    if isinstance(names, list) and _all(data, lambda row: isinstance(row, list) and len(row) == len(names)):
        return [dict(zip(map(str, names), row, strict=True)) for row in tree["data"]]
    columns, is_table = list(tree.values()), bool(_KNOWN & tree.keys())
    if _all(columns, _is_object):
        if is_table and len({frozenset(column) for column in columns}) == 1:
            return [{name: column[key] for name, column in tree.items()} for key in columns[0]]
        return columns if all(_KNOWN & row.keys() for row in columns) else [tree]
    is_table &= _all(columns, lambda column: isinstance(column, list) and not _all(column, _is_turn))
    if is_table and len({len(column) for column in columns}) == 1:
        items = itertools.chain.from_iterable(columns)
        if any(isinstance(item, str | list | dict) for item in items):  # a list of numbers is a value of one row
            return [dict(zip(tree, row, strict=True)) for row in zip(*columns, strict=True)]
    return [tree]


def _all(value: Any, test: Callable[[Any], bool]) -> bool:
    """Whether a value is a list with items that all pass a test."""
    return isinstance(value, list) and bool(value) and all(map(test, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_turn(value: Any) -> bool:
    keys = value.keys() if isinstance(value, dict) else ()
    return not ({"role", "from"}.isdisjoint(keys) or {"content", "value"}.isdisjoint(keys))
