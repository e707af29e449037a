"""Rows of feedback as tokens, in columns: 4 bytes a token and some 60 a row, in memory or mapped from files.

As Python's integers a token takes 49 bytes, in every process. Mapped files are read as rows are asked for, and what
the system keeps of them is there once for all processes.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np

from bnf_core.data.tokenization import Tokenized
from bnf_core.storage.digests import content, named_digest, rows_digest
from bnf_core.storage.files import replace_file
from bnf_core.types import Array, Example

# Of each row, but for the tokens.
DTYPES = {
    "tokens": "<i4",  # of all rows, prompt and completion; a completion's token t that is not trained is ~t
    "ends": "<i8",  # where a row's tokens end
    "prompt_lengths": "<i4",
    "labels": "|i1",
    "weights": "<f8",
    "groups": "<i8",
    "pairs": "<i8",
    "keys": "<u8",
    "highest": "<i4",  # token id
    "fates": "|u1",
    "files": "<i4",  # of `names`
    "lines": "<i8",  # −1: the name says it all
}


@dataclass(frozen=True)
class Columns:
    """A whole table, as it was made of one split of the data."""

    arrays: Mapping[str, Array]  # those of DTYPES
    names: Sequence[str]  # of the files
    digest: str  # `rows_digest`
    prompts: Array  # the groups of all rows that were read, also of bad ones, once each, in the order of the data
    about: "About"
    folder: Path | None = None  # of its files

    def remembered(self, name: str, find: Callable[[], str]) -> str:
        """What takes long to find, once for all who map these files."""
        if self.folder is None:
            return find()
        path = self.folder / f"{name}.txt"
        with suppress(OSError):
            return path.read_text(encoding="utf-8")
        found = find()
        with suppress(OSError):  # removed meanwhile, or not ours to write
            replace_file(path, found)
        return found


@dataclass
class About:
    """What a person should know of the data."""

    shape: str = ""  # of its rows, in words
    skipped: list[str] = field(default_factory=list)  # the message of every bad row
    unused: list[str] = field(default_factory=list)  # columns that are passed over
    unwritten: list[str] = field(default_factory=list)  # keys of messages that the chat template does not write
    neither: int = 0  # completions that are left out, because their label or weight is 0


@dataclass(frozen=True)
class Part:
    """Some rows in columns, for a Builder to append: all that takes time is done."""

    arrays: Mapping[str, Array]  # of `files` the numbers are those of `names` here
    names: Sequence[str]
    content: bytes  # what `rows_digest` is of
    unwritten: frozenset[str]  # as of About


def part_of(tokens: Tokenized) -> Part:
    """These rows in columns."""
    examples, names = tokens.examples, dict[str, int]()
    places = [_place(e.source) for e in examples]
    columns: dict[str, Iterable[float] | Array] = {
        "tokens": np.concatenate([np.zeros(0, np.int32), *map(_marked, examples)]),
        "ends": np.cumsum([len(e) for e in examples], dtype=np.int64),
        "prompt_lengths": [len(e.prompt_ids) for e in examples],
        "labels": [e.label for e in examples],
        "weights": [e.weight for e in examples],
        "groups": [e.group for e in examples],
        "pairs": [e.pair for e in examples],
        "keys": [e.key for e in examples],
        "highest": [max(e.prompt_ids + e.completion_ids) for e in examples],
        "fates": [int(fate) for fate in tokens.fates],
        "files": [names.setdefault(name, len(names)) for name, _ in places],
        "lines": [line for _, line in places],
    }
    arrays = {name: np.asarray(column, DTYPES[name]) for name, column in columns.items()}
    return Part(arrays, list(names), b"".join(map(content, examples)), tokens.unused)


class Builder:
    """Puts parts together."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.unwritten: set[str] = set()
        self._rows = self._end = 0
        self._digest = hashlib.sha256()

    def add(self, part: Part) -> dict[str, Array]:
        """What these rows add to each column."""
        numbers = np.asarray([self.names.setdefault(name, len(self.names)) for name in part.names], np.int32)
        ends = part.arrays["ends"] + self._end
        self._rows += len(ends)
        self._end += len(part.arrays["tokens"])
        self._digest.update(part.content)
        self.unwritten |= part.unwritten
        files = numbers[part.arrays["files"]] if len(numbers) else part.arrays["files"]
        return {**part.arrays, "ends": ends, "files": files}

    @property
    def digest(self) -> str:
        """`rows_digest` of all so far."""
        return named_digest(self._rows, self._digest)


def _place(source: str) -> tuple[str, int]:
    """A file and a line; −1: the name says it all."""
    name, _, line = source.rpartition(":")
    if line.isascii() and line.isdigit() and str(int(line)) == line:
        return name, int(line)
    return source, -1


def _marked(example: Example) -> Array:
    """(T,) int32, in which what is not trained of the completion is below 0."""
    ids = np.asarray(example.prompt_ids + example.completion_ids, np.int32)
    if example.trained is not None:
        completion = ids[len(example.prompt_ids) :]
        completion[~np.asarray(example.trained)] ^= -1
    return ids


class ExampleTable(Sequence[Example]):
    """Examples that are made as they are asked for.

    Args:
        parts: tables, one after the other.
        selected: which rows of these, in which order; None: all.
    """

    def __init__(self, parts: Sequence[Columns], selected: Array | None = None):
        self.parts = parts
        self.selected = selected
        self._starts = [0, *accumulate(len(part.arrays["ends"]) for part in parts)]

    @classmethod
    def joined(cls, tables: Iterable["ExampleTable"]) -> "ExampleTable":
        """One after the other."""
        tables = list(tables)
        parts = [part for table in tables for part in table.parts]
        if all(table.selected is None for table in tables):
            return cls(parts)
        first = [0, *accumulate(table._starts[-1] for table in tables)]
        return cls(parts, np.concatenate([at + table._rows() for at, table in zip(first, tables, strict=False)]))

    def take(self, rows: Array) -> "ExampleTable":
        """Some of its rows, by their numbers or as a mask."""
        return ExampleTable(self.parts, self._rows()[rows].astype(np.int32, copy=False))

    def column(self, name: str) -> Array:
        """(rows,) of `lengths`, or of one of DTYPES that is of rows."""
        arrays = [_lengths(part) if name == "lengths" else part.arrays[name] for part in self.parts]
        whole = np.asarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)
        return whole if self.selected is None else whole[self.selected]

    @cached_property
    def digest(self) -> str:
        """`rows_digest`."""
        if len(self.parts) > 1:
            return rows_digest(self)
        if self.selected is None:
            return self.parts[0].digest
        return self.parts[0].remembered(
            hashlib.sha256(self.selected.tobytes()).hexdigest()[:24], lambda: rows_digest(self)
        )

    def __len__(self) -> int:
        return self._starts[-1] if self.selected is None else len(self.selected)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        row = range(len(self))[at] if self.selected is None else int(self.selected[at])
        number = bisect_right(self._starts, row) - 1
        part, row = self.parts[number], row - self._starts[number]
        arrays = part.arrays
        start, end = (int(arrays["ends"][row - 1]) if row else 0), int(arrays["ends"][row])
        tokens = np.array(arrays["tokens"][start:end])
        untrained = tokens < 0
        tokens[untrained] ^= -1
        ids, prompt = tuple(tokens.tolist()), int(arrays["prompt_lengths"][row])
        name, line = part.names[int(arrays["files"][row])], int(arrays["lines"][row])
        return Example(
            ids[:prompt],
            ids[prompt:],
            bool(arrays["labels"][row]),
            group=int(arrays["groups"][row]),
            pair=int(arrays["pairs"][row]),
            source=name if line < 0 else f"{name}:{line}",
            trained=tuple((~untrained[prompt:]).tolist()) if untrained.any() else None,
            weight=float(arrays["weights"][row]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def _rows(self) -> Array:
        return np.arange(len(self), dtype=np.int32) if self.selected is None else self.selected


def column(examples: Sequence[Example], name: str) -> Array:
    """(rows,) numbers: group, pair, label, weight, key or length of each, quickly where they are a table."""
    if isinstance(examples, ExampleTable):
        return examples.column(f"{name}s")
    if name == "length":
        return np.asarray([len(e) for e in examples], np.int64)
    kind = {"key": np.uint64, "weight": np.float64}.get(name, np.int64)
    return np.asarray([getattr(e, name) for e in examples], kind)


def _lengths(part: Columns) -> Array:
    return np.diff(part.arrays["ends"], prepend=0)
