"""What MLX raises, as what it means."""

from collections.abc import Iterator
from contextlib import contextmanager

# What MLX says, on a CPU, on Metal and on CUDA, in errors that are RuntimeErrors.
FULL = ("Unable to allocate", "Attempting to allocate", "Insufficient Memory", "OutOfMemory", "out of memory")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns what MLX raises where a device's memory is full into MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in FULL):
            raise
        raise MemoryError(str(error)) from error
