"""A trace of what is computed, by PyTorch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile


@contextmanager
def tracing(path: Path) -> Iterator[None]:
    """What this process computes within it, on the CPU and the GPU, as a Chrome trace (JSON)."""
    with profile() as recorded:
        yield
    recorded.export_chrome_trace(str(path))
