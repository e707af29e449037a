"""A trace of what is computed, by Metal."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import mlx.core as mx

from bnf_core.errors import UserError


def tracing(path: Path) -> AbstractContextManager[None]:
    """What the GPU computes within it, for Xcode.

    Raises:
        UserError: there is no Metal, or it was not told beforehand that it is to record.
    """
    if not mx.metal.is_available():
        raise UserError("profile: MLX records traces on Metal alone, which is not here: leave it out, or use PyTorch")
    if os.environ.get("MTL_CAPTURE_ENABLED") != "1":
        raise UserError("profile: Metal records nothing unless it is started so: set MTL_CAPTURE_ENABLED=1")
    return _capture(path)


@contextmanager
def _capture(path: Path) -> Iterator[None]:
    mx.metal.start_capture(str(path))
    try:
        yield
    finally:
        mx.metal.stop_capture()
