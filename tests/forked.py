"""Processes of a test, forked from one that has loaded the frameworks: importing them takes ten seconds each time."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from undrawn import leave_no_pictures

PRELOADED = ["bnf_align.cli", "bnf_align.commands.train", "jsonargparse", "peft", "mlx_lm", "datasets", "pytest"]
PRELOADED += [f"bnf_torch.{name}" for name in ("backend", "engine", "sharding", "tensor_parallel")]
PRELOADED += ["bnf_mlx.backend", "bnf_mlx.engine", "frozen"]


def context() -> ForkServerContext:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)  # what is not installed is passed over
    return made


def start(
    target: Callable[..., int | None],
    *args: Any,
    environment: Mapping[str, str] = {},  # nobody writes to it
    folder: Path | None = None,
    output: Path | None = None,
) -> BaseProcess:
    """A process that ends with what `target` returns, run in a folder, its standard output and error in a file."""
    process = context().Process(target=_become, args=(target, args, dict(environment), folder, output))
    process.start()
    return process


def ended(process: BaseProcess, timeout: float = 120) -> int:
    """Its exit code, once it has ended."""
    process.join(timeout)
    assert process.exitcode is not None
    return process.exitcode


def stop() -> None:
    """End the server of forks and wait for it, so that what its processes took is counted with the tests' time."""
    server = getattr(forkserver, "_forkserver", None)
    if server is not None and hasattr(server, "_stop"):  # no public way
        server._stop()


def _become(
    target: Callable[..., int | None], args: tuple[Any, ...], environment: Mapping[str, str], folder: Path | None,
    output: Path | None,
) -> None:  # fmt: skip
    os.environ.update(environment)
    leave_no_pictures()
    if folder is not None:
        os.chdir(folder)
    if output is not None:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    sys.exit(target(*args))
