"""The kinds of file that feedback is kept in. Each is read row by row and, but for .json, never held as a whole.

Reading has two halves, so that a row can be passed over, or wait in a buffer, at the cost of its bytes: a reader finds
where rows begin and end, and what it yields can be decoded into columns later, or never.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bnf_core.data.messages import Cell, RowError
from bnf_core.errors import UserError

CSV_FIELD = 2**31 - 1  # characters; Python's own limit of 131,072 is less than a long document
PARQUET_ROWS = 256  # decoded at a time: pyarrow's own 65,536 can be gigabytes of conversations
PARQUET_BYTES = 1 << 20  # read ahead in each column, instead of the column's whole part of a row group


def _as_it_is(raw: Any, source: str) -> Any:
    return raw


class RawRow(NamedTuple):
    """A row that was read but not yet decoded."""

    source: str  # file:line
    raw: Any  # the bytes of a line, the fields of a record, or the columns by name
    decode: Callable[[Any, str], Any] = _as_it_is  # from raw and source; raises RowError

    def columns(self) -> Any:
        """The row as it stands in the file, a mapping unless the row is bad.

        Raises:
            RowError: it cannot be decoded.
        """
        return self.decode(self.raw, self.source)


def number_rows(rows: Iterable[Any], name: str) -> Iterator[RawRow]:
    """Raw rows of rows that are decoded already, called name:1, name:2 and so on."""
    for number, row in enumerate(rows, 1):
        yield RawRow(f"{name}:{number}", row)


# JSON, told from JSON lines by what is there: files of either kind are called .json and .jsonl


def _read_json(path: Path) -> Iterator[RawRow]:
    return _read_json_lines(path) if _is_lines(path) else _read_json_list(path)


def _is_lines(path: Path) -> bool:
    """Whether the first line that is not blank is an object of its own, and either not the only one or a row; or, where
    it is broken, whether the file is called so."""
    called = path.suffix.lower() == ".jsonl"
    with path.open("rb") as file:
        for line in file:
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                first = json.loads(line.decode())
            except (ValueError, RecursionError):
                # A list, or an object, over several lines; or a line that is broken.
                return called and line.strip() not in (b"[", b"{") and not line.lstrip().startswith((b"[{", b"[ {"))
            alone = not any(rest.strip() for rest in file)
            return not (alone and (isinstance(first, list) or _rows_within(first) is not None))
    return True


def _rows_within(content: Any) -> str | None:
    """The key under which an object holds the rows of a file; None: it is no such object."""
    lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, Mapping) else []
    return lists[0] if lists in (["data"], ["rows"], ["train"]) and "prompt" not in content else None


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    # Read as bytes, because only a newline ends a line: text may hold U+2028 and its like.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield RawRow(f"{path}:{number}", line, _decode_json)


def _decode_json(line: bytes, source: str) -> Any:
    try:
        return json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise _not_utf8(source, error) from error
    except (ValueError, RecursionError) as error:
        raise _not_json(source, error, "Write one JSON object on each line") from error


def _read_json_list(path: Path) -> Iterator[RawRow]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8_in(path, error) from error
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(f"{path}:{getattr(error, 'lineno', 1)}", error, "Mend the file there") from error
    key = _rows_within(rows)
    if not isinstance(rows, list) and key is None:
        raise UserError(
            f"{path}: expected a list of objects, found one {type(rows).__name__}. Write [{{...}}, {{...}}], or one "
            "object on each line."
        )
    if key is not None:
        yield from number_rows(rows[key], f"{path}[{key}]")
        return
    # The file is sound: walk it once more, element by element, for the line where each begins.
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, line = text.find("[") + 1, 1 + text.count("\n", 0, text.find("[") + 1)
    for _ in rows:
        start = between.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string
        line += text.count("\n", at, start)
        row, at = decoder.raw_decode(text, start)
        yield RawRow(f"{path}:{line}", row)
        line += text.count("\n", start, at)


# CSV


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] = []
        while True:
            source = f"{path}:{reader.line_num + 1}"  # a quoted field may hold newlines: name the row's first line
            try:
                fields = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise _not_utf8_in(path, error) from error
            except csv.Error as error:
                raise RowError(
                    source, "", f"not CSV: {error}", 'Put fields in double quotes and double the quotes in them, ""'
                ) from error
            if fields and columns:
                yield RawRow(source, fields, partial(_decode_csv, columns))
            elif fields:
                columns = [name.strip() for name in fields]


def _decode_csv(columns: Sequence[str], fields: Sequence[str], source: str) -> dict[str, Any]:
    if len(fields) != len(columns):
        problem = f"found {len(fields)} fields, expected {len(columns)} ({', '.join(columns)})"
        raise RowError(source, "", problem, "Put fields that hold commas or newlines in double quotes")
    return {c: _csv_value(c, v, source) for c, v in zip(columns, fields, strict=True)}


def _csv_value(column: str, text: str, source: str) -> Any:
    """CSV has only text: messages are written as JSON."""
    if not re.match(r"\s*\[\s*\{", text):
        return Cell(text)
    try:
        value = json.loads(text)
        return value if all(isinstance(item, dict) for item in value) else Cell(text)
    except ValueError as error:
        if re.match(r"\s*\[\s*\{\s*'(role|content)'", text):
            raise RowError(
                source, column, "is a list in Python's notation, expected JSON", "Write the column with json.dumps"
            ) from error
        return Cell(text)


# Parquet


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BYTES, pre_buffer=False) as file:
            batches = file.iter_batches(PARQUET_ROWS)
            yield from number_rows((row for batch in batches for row in batch.to_pylist()), str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file that can be read: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Faults


def _not_utf8(source: str, error: UnicodeDecodeError) -> RowError:
    return RowError(source, "", f"byte {error.start + 1} of the line is not UTF-8", "Save the file as UTF-8")


def _not_utf8_in(path: Path, error: UnicodeDecodeError) -> RowError:
    """The same with the line at fault, which decoding a whole file or blocks of it does not tell."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                return _not_utf8(f"{path}:{number}", found)
    return _not_utf8(str(path), error)  # mended in the meantime


def _not_json(source: str, error: Exception, remedy: str) -> RowError:
    if not isinstance(error, json.JSONDecodeError):
        return RowError(source, "", f"not JSON: {error}", remedy)
    return RowError(source, "", f"column {error.colno}: not JSON: {error.msg}", remedy)
