"""Work on rows spread over the cores: by the fast tokenizers' own threads, or, of many rows, by several processes.

Threads take no time to start, but a fourth of the work, chat templates and checks, is Python's and stays on one core.
A process takes some seconds to start.
"""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from bnf_core.errors import TrainingStopped

T = TypeVar("T")
R = TypeVar("R")

MANY = 20_000  # rows; fewer are done before processes have started
PER_WORKER = 5_000
PARALLELISM = "TOKENIZERS_PARALLELISM"


def workers_for(rows: int) -> int:
    """How many processes are worth starting; 0: none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    may = cores > 1 and not multiprocessing.current_process().daemon  # which may have no processes of its own
    return min(cores, rows // PER_WORKER) if rows >= MANY and may else 0


def on_all_cores(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """What `work` makes of each item, in order; what it raises is raised here, in its turn.

    Args:
        workers: processes to start; 0: none, and the tokenizers use threads.
    Raises:
        TrainingStopped: one of them was killed.
    """
    if not workers:
        with _tokenizer_threads():
            yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take over locks that threads of this process hold
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,))
    try:
        with _without_main():
            waiting = deque(pool.submit(_work, item) for item in items)
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingStopped(
            "a process that makes tokens has ended, perhaps for want of memory. Nothing is lost: start the same again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _tokenizer_threads() -> Iterator[None]:
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not run the user's script once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# In a worker

_worker: list[Callable[[Any], Any]] = []


def _begin(work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for it decides
    os.environ[PARALLELISM] = "false"
    _worker.append(work)


def _work(item: Any) -> Any:
    return _worker[0](item)
