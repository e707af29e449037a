"""Timing side by side: each contender in turn does one piece of its work, over and over, in one process.

Machines are noisy, and their noise is slower than a round: what two contenders took in the same round can be
compared, what they took on different days cannot. A trainer runs its own loop and cannot be called step by step, so
each contender has a thread, of which only one ever runs.
"""

import ctypes
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout

M_ARENA_MAX = -8  # of glibc's malloc.h

# Sets itself up and works without end, or as long as it can, calling what it is given after every piece of work.
Work = Callable[[Callable[[], None]], None]


class ContenderFailed(Exception):
    """A contender raised something, or came to its end too early."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def rounds(contenders: Mapping[str, Work]) -> Iterator[dict[str, float]]:
    """Warm up, then round after round, without end, the seconds that each contender took for a piece of work. The
    order goes round, so that nobody always follows the same other. Leaving the iterator ends the work.

    Raises:
        ContenderFailed: at its first piece of work or a later one.
    """
    _share_a_heap()
    with ExitStack() as stack:
        turns = {name: _Turns(name, work) for name, work in contenders.items()}
        for one in turns.values():
            stack.callback(one.end)
        for one in turns.values():
            one.take()  # the first piece of work comes with loading and compiling
        names = list(turns)
        while True:
            taken = {name: turns[name].take() for name in names}
            yield {name: taken[name] for name in turns}
            names.append(names.pop(0))


def repeated(job: Callable[[], None], times: int = 1) -> Work:
    """A contender whose piece of work is a job, so many times."""

    def work(pause: Callable[[], None]) -> None:
        while True:
            for _ in range(times):
                job()
            pause()

    return work


def _share_a_heap() -> None:
    """glibc gives each thread a heap of its own, which keeps what the thread frees: eight trainers would hold eight
    steps' memory. With one heap for all, as in a process of one thread, each takes what the one before it freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # Linux
        libc.mallopt(M_ARENA_MAX, 1)


class _Ended(BaseException):
    """Unwinds a contender that nobody waits for any more; no `except Exception` on the way stops it."""


class _Turns:
    """One contender and its thread."""

    def __init__(self, name: str, work: Work):
        self.name = name
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._work, self._reason, self._ended = work, "", False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def take(self) -> float:
        """One piece of work; what it prints is dropped."""
        if not self._thread.is_alive() and not self._ended:
            self._thread.start()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            started = time.perf_counter()
            self._go.release()
            self._back.acquire()
            seconds = time.perf_counter() - started
        if self._reason:
            raise ContenderFailed(self.name, self._reason)
        return seconds

    def end(self) -> None:
        self._ended = True
        if self._thread.is_alive():
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                self._go.release()
                self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._ended:
                self._work(self._pause)
            self._reason = "came to its end"
        except _Ended:
            pass
        except BaseException as error:
            self._reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._ended:
            raise _Ended
