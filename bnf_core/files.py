"""Writing all or nothing: a reader, or the next run, finds the old content or the new, never a part of it.

What takes the old one's place has reached the disk before, so this holds through a kill and a power cut.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into; it takes the place of `folder` if no error is raised.

    A folder cannot be renamed onto another in one go: a kill between the two renames at the end leaves the old one
    as `.NAME.replaced`, and the next call puts it back first.

    Raises:
        OSError: the disk is full, or writing is not allowed; `folder` is as it was.
    """
    partial, replaced = (folder.with_name(f".{folder.name}.{ending}") for ending in ("partial", "replaced"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        _sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def replace_file(path: Path, content: str) -> None:
    """Write a text file whole.

    Raises:
        OSError: the disk is full, or writing is not allowed; the file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        _sync(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # which can do neither through a descriptor opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
