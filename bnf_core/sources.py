"""Where feedback comes from: files, folders and Hub data sets, read row by row with line numbers; and how its
prompts are grouped and split.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnf_core.errors import UserError
from bnf_core.records import Feedback, RowError, Text, parse_row

Rows = Iterator[tuple[str, Any]]  # file:line, and the row there or the RowError met in reading it

# The names a split may have, best first. Held-out data that is only called test serves as valid.
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "test"), "test": ("test",)}


@dataclass(frozen=True)
class LoadedFeedback:
    rows: list[Feedback]
    skipped: list[str]  # the message of every bad row, when they are to be skipped


def load_feedback(path_or_name: str, split: str = "train", skip_bad_rows: bool = False) -> LoadedFeedback:
    """Read feedback from wherever it is.

    Args:
        path_or_name: a .jsonl, .json, .csv or .parquet file, a folder with train, valid and test files of those
            kinds, or a Hub data set as owner/name.
        split: train, valid or test; a single file is the split it is asked for.
        skip_bad_rows: list bad rows in `skipped` instead of stopping at the first.
    Raises:
        RowError: a bad row, unless they are to be skipped.
        UserError: nothing there, not readable, no such split, no row or no good row.
    """
    loaded = LoadedFeedback([], [])
    for source, row in read_rows(path_or_name, split):
        try:
            if isinstance(row, RowError):
                raise row
            loaded.rows.extend(parse_row(row, source))
        except RowError as error:
            if not skip_bad_rows:
                raise
            loaded.skipped.append(str(error))
    if loaded.skipped and not loaded.rows:
        raise UserError(
            f"{path_or_name}: none of its {len(loaded.skipped)} rows is usable; the first: {loaded.skipped[0]}"
        )
    if not loaded.rows:
        raise UserError(f"{path_or_name}: no rows in the {split} split. Expected at least one row of feedback.")
    return loaded


def has_split(path_or_name: str, split: str) -> bool:
    """Whether `load_feedback(path_or_name, split)` has data of its own for that split.

    A single file is all train. Asks the Hub for a Hub data set.

    Raises:
        UserError: nothing there, or an unknown split.
    """
    path = Path(path_or_name).expanduser()
    names = _split_names(split)
    if path.is_dir():
        return bool(_split_files(path, names))
    if path.exists():
        return split == "train"
    _check_hub_name(path_or_name)
    return not set(names).isdisjoint(_hub_splits(path_or_name))


def assign_groups(rows: Sequence[Feedback]) -> list[int]:
    """A number per row, from 0 in order of appearance; rows with equal prompts share it."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(_prompt_key(row.prompt), len(numbers)) for row in rows]


def split_by_prompt(rows: Sequence[Feedback], fraction: float, seed: int) -> tuple[list[Feedback], list[Feedback]]:
    """Hold out a share of the prompts, with all of their rows: no prompt is on both sides.

    Args:
        rows: feedback; both sides keep its order.
        fraction: share of the prompts to hold out, above 0 and below 1; at least one prompt goes to either side.
        seed: the same seed and prompts give the same split.
    Returns:
        train, held_out
    Raises:
        UserError: fewer than two prompts, or a share out of range.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the share of prompts to hold out is {fraction}: expected a number above 0 and below 1")
    groups = assign_groups(rows)
    count = len(set(groups))
    if count < 2:
        raise UserError(
            f"cannot hold out prompts: the data has {count} different prompt{'' if count == 1 else 's'}, expected at "
            "least 2. Give held-out data in a file of its own, or train without."
        )
    held = min(max(round(fraction * count), 1), count - 1)
    chosen = set(np.random.Generator(np.random.PCG64(seed)).permutation(count)[:held].tolist())
    sides: tuple[list[Feedback], list[Feedback]] = ([], [])
    for row, group in zip(rows, groups, strict=True):
        sides[group in chosen].append(row)
    return sides


def _prompt_key(prompt: Text) -> Hashable:
    return prompt if isinstance(prompt, str) else ("messages", json.dumps(prompt, sort_keys=True, default=str))


# Finding the rows


def read_rows(path_or_name: str, split: str) -> Rows:
    """(file:line, row as read or what is wrong with it) of one split, unchecked.

    Raises:
        UserError: as `load_feedback`, but for bad rows.
    """
    path = Path(path_or_name).expanduser()
    names = _split_names(split)
    if path.is_dir():
        files = _split_files(path, names)
        if not files:
            held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{path}: no {split} file in this folder, which holds {held}. Expected "
                f"{' or '.join(names)} with one of the endings {', '.join(READERS)}."
            )
        if len(files) > 1:
            found = " and ".join(p.name for p in files)
            raise UserError(f"{path}: {found} are both the {split} split. Keep one, or give the file itself.")
        path = files[0]
    elif not path.exists():
        _check_hub_name(path_or_name)
        return _read_hub(path_or_name, names)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file. Expected one of the endings {', '.join(READERS)}.")
    return _readable(reader, path)


def _readable(reader: Callable[[Path], Rows], path: Path) -> Rows:
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _split_names(split: str) -> tuple[str, ...]:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: expected {', '.join(SPLITS)}")
    return SPLITS[split]


def _split_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the first of these names that has any."""
    for name in names:
        if files := [p for ending in READERS if (p := folder / f"{name}{ending}").is_file()]:
            return files
    return []


def _check_hub_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).suffix.lower() in READERS:
        raise UserError(
            f"{name}: no such file or folder. Expected a {', '.join(READERS)} file, a folder with such files, or a "
            "Hub data set as owner/name. Relative paths start at the current folder."
        )


# Reading the rows


def _read_jsonl(path: Path) -> Rows:
    # Read as bytes, because only a newline ends a line: text may hold U+2028 and its like.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield source, json.loads(text.rstrip())
            except UnicodeDecodeError as error:
                yield source, _not_utf8(source, error.start + 1)
            except (ValueError, RecursionError) as error:
                yield source, _not_json(source, error, "Write one JSON object on each line")


def _read_json(path: Path) -> Rows:
    text = _decode(path)
    try:
        rows = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise _not_json(f"{path}:{getattr(error, 'lineno', 1)}", error, "Mend the file there") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of objects, found one {type(rows).__name__}. Write [{{...}}, {{...}}]."
        )
    # The file is sound: walk it once more, element by element, for the line where each begins.
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, line = text.find("[") + 1, 1 + text.count("\n", 0, text.find("[") + 1)
    for _ in rows:
        start = between.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string
        line += text.count("\n", at, start)
        row, at = decoder.raw_decode(text, start)
        yield f"{path}:{line}", row
        line += text.count("\n", start, at)


def _read_csv(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    columns: list[str] = []
    while True:
        source = f"{path}:{reader.line_num + 1}"  # a quoted field may hold newlines: name the row's first line
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RowError(
                source, "", f"not CSV: {error}", 'Put fields in double quotes and double the quotes in them, ""'
            ) from error
        if not fields:
            continue
        if not columns:
            columns = [name.strip() for name in fields]
        elif len(fields) != len(columns):
            problem = f"found {len(fields)} fields, expected {len(columns)} ({', '.join(columns)})"
            yield source, RowError(source, "", problem, "Put fields that hold commas or newlines in double quotes")
        else:
            try:
                yield source, {c: _csv_value(c, v, source) for c, v in zip(columns, fields, strict=True)}
            except RowError as error:
                yield source, error


def _csv_value(column: str, text: str, source: str) -> Any:
    """CSV has only text: labels are written true and false, messages as JSON."""
    if column == "label":
        return {"true": True, "false": False}.get(text.strip().casefold(), text)
    if not re.match(r"\s*\[\s*\{", text):
        return text
    try:
        value = json.loads(text)
        return value if all(isinstance(item, dict) for item in value) else text
    except ValueError as error:
        if re.match(r"\s*\[\s*\{\s*'(role|content)'", text):
            raise RowError(
                source, column, "is a list in Python's notation, expected JSON", "Write the column with json.dumps"
            ) from error
        return text


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file that can be read: {error}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, names: Sequence[str]) -> Rows:
    known = _hub_splits(name)
    split = next((n for n in names if n in known), None)
    if split is None:
        raise UserError(f"{name}: this Hub data set has no {names[0]} split, only {', '.join(known)}")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # a dozen kinds, from three libraries
        raise _hub_error(name, error) from error
    for number, row in enumerate(rows, 1):
        yield f"{name}[{split}]:{number}", row


def _hub_splits(name: str) -> list[str]:
    import datasets

    try:
        return [str(split) for split in datasets.get_dataset_split_names(name)]
    except Exception as error:  # a dozen kinds, from three libraries
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name}: there is no such file or folder here, and as a Hub data set it cannot be loaded: "
        f"{' '.join(str(error).split()) or type(error).__name__}. Check the spelling, the connection and, for a "
        "private data set, `hf auth login`; or download its files and give their folder."
    )


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        raise _not_utf8(f"{path}:{line + 1}", error.start - data.rfind(b"\n", 0, error.start)) from error


def _not_utf8(source: str, byte: int) -> RowError:
    return RowError(source, "", f"byte {byte} of the line is not UTF-8", "Save the file as UTF-8")


def _not_json(source: str, error: Exception, remedy: str) -> RowError:
    if not isinstance(error, json.JSONDecodeError):
        return RowError(source, "", f"not JSON: {error}", remedy)
    return RowError(source, "", f"column {error.colno}: not JSON: {error.msg}", remedy)
