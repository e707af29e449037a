"""Where feedback comes from: files, folders of them and Hub data sets, read row by row with line numbers; and how its
prompts are grouped and split.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bnf_core.config import Where
from bnf_core.data.messages import RowError, Text
from bnf_core.data.readers import READERS, RawRow, number_rows
from bnf_core.data.reading import Reading, RowReader
from bnf_core.data.records import Feedback
from bnf_core.errors import UserError
from bnf_core.storage.digests import files_digest
from bnf_core.types import Array

# The names a split may have, best first. Held-out data that is only called test serves as valid.
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "test"), "test": ("test",)}
# What follows the name where a split is several files: -0, _07, -00000-of-00004, with a hash behind it on the Hub.
SHARD = r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?"


@dataclass(frozen=True)
class Source:
    """The rows of one split, wherever they are."""

    name: str  # for messages
    read: Callable[[], Iterator[RawRow]]  # all rows from the first; UserError if they can't be read, or have changed
    files: Sequence[Path] = ()  # none for what is not read from files


@dataclass(frozen=True)
class LoadedFeedback:
    rows: list[Feedback]
    skipped: list[str]  # the message of every bad row, when they are to be skipped
    unused: set[str] = field(default_factory=set)  # columns that are passed over
    shape: str = ""  # of the rows, in words
    neither: int = 0  # completions whose label or weight is 0, which are left out


def load_feedback(
    path_or_rows: str | Where | Source | Iterable[Any],
    split: str = "train",
    skip_bad_rows: bool = False,
    reading: Reading | None = None,
) -> LoadedFeedback:
    """Read feedback from wherever it is, all of it into memory.

    Args:
        path_or_rows: where it is, a .jsonl, .json, .csv or .parquet file, a folder with train, valid and test files of
            those kinds or one that `datasets` saved, or a Hub data set as owner/name; what `find_source` found; or rows
            from Python, mappings.
        split: train, valid or test; a single file is the split it is asked for.
        skip_bad_rows: list bad rows in `skipped` instead of stopping at the first.
        reading: the names of columns, and how labels are made.
    Raises:
        RowError: a bad row, unless they are to be skipped.
        UserError: nothing there, not readable, no such split, no row or no good row.
    """
    reader = RowReader(reading)
    source = path_or_rows if isinstance(path_or_rows, Source) else _source(path_or_rows, split)
    found: list[Feedback] = []
    skipped: list[str] = []
    for row in source.read():
        try:
            found.extend(reader(row.columns(), row.source))
        except RowError as error:
            if not skip_bad_rows:
                raise
            skipped.append(str(error))
    rows = reader.finish(found, (group_of(row) for row in found))
    if reader.neither and not rows:
        raise nothing_said(source.name, reader.neither)
    if skipped and not rows:
        raise UserError(f"{source.name}: none of its {len(skipped)} rows is usable; the first: {skipped[0]}")
    if not rows:
        raise no_rows(source.name, split)
    return LoadedFeedback(rows, skipped, reader.unused, reader.described(), reader.neither)


def read_rows(path_or_name: str | Where, split: str) -> Iterator[tuple[str, Any]]:
    """(file:line, row as it stands there or the RowError met in decoding it) of one split, unchecked.

    Raises:
        RowError: a file that is broken from some row on.
        UserError: nothing there, not readable, no such split.
    """
    for row in find_source(path_or_name, split).read():
        try:
            yield row.source, row.columns()
        except RowError as error:
            yield row.source, error


def no_rows(name: str, split: str) -> UserError:
    return UserError(f"{name}: no rows in the {split} split. Expected at least one row of feedback.")


def nothing_said(name: str, neither: int) -> UserError:
    return UserError(
        f"{name}: the labels or weights of all {neither} completions are 0: expected chosen or rejected ones. Mend "
        "them, or data.label"
    )


def has_split(path_or_name: str | Where, split: str) -> bool:
    """Whether `load_feedback(path_or_name, split)` has data of its own for that split.

    A single file is all train. Asks the Hub for a Hub data set.

    Raises:
        UserError: nothing there, or an unknown split.
    """
    where = _where(path_or_name)
    path = Path(where.path).expanduser()
    names = _split_names(split)
    if path.is_dir():
        if is_saved(path):
            return split == "train" if _is_one(path) else _saved_split(path, names) is not None
        return bool(_split_files(path, names))
    if path.exists():
        return split == "train"
    _check_hub_name(where.path)
    return not set(names).isdisjoint(_hub_splits(where))


def prompt_group(prompt: Text, *given: Any) -> int:
    """A number below 2^63 that equal prompts share, and no others: 63 bits of a hash of the content.

    Args:
        prompt: text or messages.
        given: what the chat template is given besides, such as tools; None: nothing.
    """
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    if any(item is not None for item in given):
        text += json.dumps(given, sort_keys=True, default=str)
    kind = b"text" if isinstance(prompt, str) else b"messages"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=kind).digest()) >> 1


def group_of(row: Feedback) -> int:
    """`prompt_group` of a row."""
    return prompt_group(row.prompt, row.tools, row.template_kwargs)


def pair_number(source: str) -> int:
    """A number below 2^63, not 0, for the pair that stands at file:line."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8, person=b"pair").digest()) >> 1 | 1


def held_out_prompts(prompts: Sequence[int] | Array, fraction: float, seed: int) -> set[int]:
    """Which prompts are held out, with all of their rows.

    Args:
        prompts: the group of each, once, in the order of the data.
        fraction: share of the prompts to hold out, above 0 and below 1; at least one prompt goes to either side.
        seed: the same seed and prompts give the same split.
    Raises:
        UserError: fewer than two prompts, or a share out of range.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the share of prompts to hold out is {fraction}: expected a number above 0 and below 1")
    count = len(prompts)
    if count < 2:
        raise UserError(
            f"cannot hold out prompts: the data has {count} different prompt{'' if count == 1 else 's'}, expected at "
            "least 2. Give held-out data in a file of its own, or train without."
        )
    held = min(max(round(fraction * count), 1), count - 1)
    return {int(prompts[i]) for i in np.random.Generator(np.random.PCG64(seed)).permutation(count)[:held]}


# Finding the rows


def find_source(path_or_name: str | Where, split: str, streaming: bool = False) -> Source:
    """One split of a file, a folder or a Hub data set, as `load_feedback` describes them; nothing is read yet.

    Args:
        split: train, valid, test, or what the data themselves call theirs.
        streaming: read a Hub data set over the network, row by row, instead of fetching it first.
    Raises:
        UserError: nothing there, no such split, shards missing, or an unknown kind of file.
    """
    where = _where(path_or_name)
    path = Path(where.path).expanduser()
    names = _split_names(split)
    if path.is_dir() and is_saved(path):
        return _saved(path, names)
    if path.is_dir():
        files = _split_files(path, names)
        if not files:
            held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{path}: no {split} file in this folder, which holds {held}. Expected "
                f"{' or '.join(names)} with one of the endings {', '.join(READERS)}, or such files numbered as "
                f"{names[0]}-0, or in a folder {names[0]}."
            )
        _check_shards(path, files, split)
        return _files(where.path, files)
    if not path.exists():
        _check_hub_name(where.path)
        return _hub(where, names, streaming)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: unknown kind of file. Expected one of the endings {', '.join(READERS)}.")
    if split not in SPLITS:
        raise UserError(f"{path}: unknown split {split!r}: expected {', '.join(SPLITS)}; a file has no others")
    return _files(where.path, [path])


def _source(path_or_rows: str | Where | Iterable[Any], split: str) -> Source:
    if isinstance(path_or_rows, str | Where):
        return find_source(path_or_rows, split)
    return source_of(path_or_rows, split)


def _where(path_or_name: str | Where) -> Where:
    return Where(path_or_name) if isinstance(path_or_name, str) else path_or_name


def source_of(rows: Iterable[Any], split: str) -> Source:
    """Rows from Python: mappings, such as those of a `datasets.IterableDataset`, read anew each time.

    An iterator is spent after one epoch; what `iter` begins anew, such as a list, is not.
    """
    name = f"{type(rows).__name__}[{split}]"
    return Source(name, partial(number_rows, rows, name))


def digest(path_or_name: str | Where, split: str) -> str:
    """Of the files of a split, as `files_digest`, or the name alone of a Hub data set.

    Raises:
        UserError: as `find_source`, or a file that cannot be read.
    """
    source = find_source(path_or_name, split, streaming=True)
    if not source.files:
        return source.name
    try:
        return files_digest(source.files)
    except OSError as error:
        raise _unreadable(Path(error.filename or source.name), error) from error


def _split_names(split: str) -> tuple[str, ...]:
    return SPLITS.get(split, (split,))


# Files


def _files(name: str, paths: Sequence[Path]) -> Source:
    return Source(name, partial(_read_files, {path: _stamp(path) for path in paths}), paths)


def _read_files(stamps: dict[Path, tuple[int, int]]) -> Iterator[RawRow]:
    """One file after the other, each the same as when it was found: otherwise no order of rows can be gone on with."""
    for path, stamp in stamps.items():
        _check_unchanged(path, stamp)
        try:
            yield from READERS[path.suffix.lower()](path)
        except OSError as error:
            raise _unreadable(path, error) from error
        _check_unchanged(path, stamp)


def _check_unchanged(path: Path, stamp: tuple[int, int]) -> None:
    if _stamp(path) != stamp:
        raise UserError(
            f"{path}: has changed since it was first read. Start again with data that stays as it is; a run that is "
            "resuming needs the file as it was."
        )


def _stamp(path: Path) -> tuple[int, int]:
    """Size in bytes, and time of the last change in nanoseconds."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def _split_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the first of these names that has any, in the order of their names."""
    for name in names:
        own = re.compile(f"{re.escape(name)}({SHARD})?")
        here = [p for p in folder.iterdir() if own.fullmatch(p.stem)]
        inside = folder / name
        within = [p for p in inside.iterdir() if not p.name.startswith(".")] if inside.is_dir() else []
        if files := [p for p in here + within if p.suffix.lower() in READERS and p.is_file()]:
            return sorted(files)
    return []


def _check_shards(folder: Path, files: Sequence[Path], split: str) -> None:
    """That the files are parts of one split, rather than several copies of it, and all there."""
    if len(files) > 1 and (
        len({p.parent for p in files}) > 1
        or len({p.stem for p in files}) < len(files)
        or any(p.parent == folder and p.stem in _split_names(split) for p in files)
    ):
        found = " and ".join(str(p.relative_to(folder)) for p in files[:4])
        raise UserError(f"{folder}: {found} are both the {split} split. Keep one, or give the file itself.")
    totals = {int(match[1]) for p in files if (match := re.search(r"\d-of-(\d+)", p.stem))}
    if totals and totals != {len(files)}:
        wanted = " or ".join(map(str, sorted(totals)))
        raise UserError(
            f"{folder}: the {split} split is {wanted} files by their names, found {len(files)}: "
            f"{', '.join(p.name for p in files[:4])}. Fetch the missing ones, and keep no others."
        )


# What `save_to_disk` of datasets wrote: a data set, or several by the names of their splits

ONE, SEVERAL = "state.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    return _is_one(folder) or (folder / SEVERAL).is_file()


def _is_one(folder: Path) -> bool:
    return (folder / ONE).is_file() and (folder / "dataset_info.json").is_file()


def _saved_split(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if _is_one(folder / name)), None)


def _saved(folder: Path, names: Sequence[str]) -> Source:
    found = folder if _is_one(folder) else _saved_split(folder, names)
    if found is None:
        held = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
        raise UserError(f"{folder}: no {names[0]} split in this saved data set, only {held}")
    files = sorted(found.glob("*.arrow"))
    stamps = {path: _stamp(path) for path in files}
    return Source(str(found), partial(_read_saved, found, stamps), files)


def _read_saved(folder: Path, stamps: dict[Path, tuple[int, int]]) -> Iterator[RawRow]:
    import datasets

    for path, stamp in stamps.items():
        _check_unchanged(path, stamp)
    try:
        yield from number_rows(datasets.load_from_disk(str(folder)), str(folder))
    except Exception as error:  # a missing shard, a broken one, one of a later version: each raises its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: the saved data set cannot be read: {why}. Save it again") from error


# The Hub


def _check_hub_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).suffix.lower() in READERS:
        raise UserError(
            f"{name}: no such file or folder. Expected a {', '.join(READERS)} file, a folder with such files, or a "
            "Hub data set as owner/name. Relative paths start at the current folder."
        )


def _hub(where: Where, names: Sequence[str], streaming: bool) -> Source:
    name, known = str(where), _hub_splits(where)
    split = next((n for n in names if n in known), None)
    if split is None:
        raise UserError(f"{name}: this Hub data set has no {names[0]} split, only {', '.join(known)}")
    import datasets

    try:
        rows = datasets.load_dataset(where.path, **_of_hub(where), split=split, streaming=streaming)
    except Exception as error:  # a dozen kinds, from three libraries
        raise _hub_error(name, error) from error
    full = f"{name}[{split}]"
    fetched = [Path(file["filename"]) for file in getattr(rows, "cache_files", ())]
    return Source(full, partial(_read_hub, rows, name, full), fetched)


def _read_hub(rows: Iterable[Any], name: str, full: str) -> Iterator[RawRow]:
    try:
        yield from number_rows(rows, full)
    except Exception as error:  # the same, in the midst of a stream
        raise _hub_error(name, error) from error


def _hub_splits(where: Where) -> list[str]:
    import datasets

    named = {"config_name" if key == "name" else key: value for key, value in _of_hub(where).items()}
    try:
        return [str(split) for split in datasets.get_dataset_split_names(where.path, **named)]
    except Exception as error:  # a dozen kinds, from three libraries
        raise _hub_error(str(where), error) from error


def _of_hub(where: Where) -> dict[str, str]:
    """What is said, as `datasets.load_dataset` calls it."""
    said = {"name": where.subset, "revision": where.revision}
    return {key: value for key, value in said.items() if value is not None}


def _hub_error(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name}: there is no such file or folder here, and as a Hub data set it cannot be loaded: "
        f"{' '.join(str(error).split()) or type(error).__name__}. Check the spelling, the connection and, for a "
        "private data set, `hf auth login`; or download its files and give their folder."
    )
