"""Writing all or nothing: a reader, or the next run, finds the old content or the new, never a part of it.

What takes the old one's place has reached the disk before, so this holds through a kill and a power cut.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from bnf_core.errors import UserError
from bnf_core.processes import ALONE, Processes

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none


@contextmanager
def agreed(processes: Processes) -> Iterator[None]:
    """An error that one process raises in the block is raised by all, once each has come to its end: nobody goes on,
    or waits for one that will not come.

    Raises:
        OSError: another process failed; its rank and message.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    message = "" if failure is None else f"process {processes.rank}: {failure or type(failure).__name__}"
    messages = [data.decode() for data in processes.gather_bytes(message.encode())]
    if failure is not None:
        raise failure
    if any(messages):
        raise OSError("; ".join(filter(None, messages)))


@contextmanager
def replacing(folder: Path, processes: Processes = ALONE) -> Iterator[Path]:
    """An empty folder beside `folder` to write into; it takes the place of `folder` if no error is raised.

    A folder cannot be renamed onto another in one go: a kill between the two renames at the end leaves the old one
    as `.NAME.replaced`, and the next call puts it back first.

    Several processes may write into it, each its own files, if all see the same file system. What one raises in the
    block all must raise (see `agreed`); the first one makes the folder and moves it.

    Raises:
        OSError: the disk is full, or writing is not allowed; `folder` is as it was.
    """
    partial, replaced = (folder.with_name(f".{folder.name}.{ending}") for ending in ("partial", "replaced"))
    first = processes.rank == 0
    with agreed(processes):
        if first:
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
    try:
        yield partial
        processes.barrier()  # all have written
        with agreed(processes):
            if first:
                let_others_read(partial)
                for path in partial.rglob("*"):
                    sync(path)
                sync(partial)
                if folder.exists():
                    folder.rename(replaced)
                partial.rename(folder)
                sync(folder.parent)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        shutil.rmtree(replaced, ignore_errors=True)


def let_others_read(folder: Path) -> None:
    """Give the files of a folder the mode that its maker's umask gives new ones. Safetensors makes files that only
    their owner can read, whatever the umask."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(path.parent.stat().st_mode & 0o666)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole; text as UTF-8.

    Raises:
        OSError: the disk is full, or writing is not allowed; the file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    sync(path.parent)


def lock(path: Path, *, wait: bool) -> BaseFileLock:
    """Take a lock that the system lets go of when this process ends; the file stays, since a lock on a file that was
    removed keeps nobody out. On a file system without locks nothing is taken (`is_locked` says so): a file in a lock's
    place would outlive a process that was killed, and keep out the one that comes after it.

    Args:
        wait: until another process lets go of it.
    Raises:
        Timeout: another process has it.
        OSError: the file cannot be written.
    """
    made = FileLock(path, fallback_to_soft=False)
    try:
        made.acquire(blocking=wait)
    except OSError as error:  # of which Timeout is one
        if error.errno not in NO_LOCKS:
            raise
    return made


@contextmanager
def held(folder: Path, by: str, processes: Processes = ALONE) -> Iterator[None]:
    """Keep others out of an output folder, which is made where it is not there. The system lets go of it when this
    process ends in whatever way. A file system without locks keeps nobody out.

    Args:
        by: what others are, for the message: run.
        processes: all call this; the first one takes the lock.
    Raises:
        UserError: another one has the folder, or it cannot be made.
    """
    taken_by_us: BaseFileLock | None = None
    taken = False
    if processes.rank == 0:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output {folder} is a file: expected a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken_by_us = lock(folder / ".lock", wait=False)
        except Timeout:
            taken = True
        except OSError as error:
            raise UserError(f"output {folder}: {error.strerror}") from error
    try:
        if processes.any(taken):
            raise UserError(f"another {by} is writing to {folder}: choose another --output, or wait for its end")
        yield
    finally:
        if taken_by_us is not None:
            taken_by_us.release()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # which can do neither through a descriptor opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
