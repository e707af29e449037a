"""Errors meant for the person at the keyboard: what was wrong, where, and what to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Bad usage or bad input. The CLI prints the message alone and exits with code 2."""


class Failed(Exception):
    """Nobody's mistake here, such as a server that does not answer. Exit code 1."""


class TrainingStopped(Failed):
    """A run that cannot go on, such as a loss that is not finite."""


@contextmanager
def memory_errors(full: Sequence[str]) -> Iterator[None]:
    """Turns what a framework raises where a device's memory is full into MemoryError.

    Args:
        full: what it says then, in errors that are RuntimeErrors.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in full):
            raise
        raise MemoryError(str(error)) from error
