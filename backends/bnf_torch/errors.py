"""What PyTorch raises, as what it means."""

from collections.abc import Iterator
from contextlib import contextmanager

FULL = ("out of memory", "can't allocate memory")  # what PyTorch says, in errors that are RuntimeErrors


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what PyTorch raises where a device's memory is full into MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in FULL):
            raise
        raise MemoryError(str(error)) from error
