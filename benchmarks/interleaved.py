"""Timing side by side: each contender in turn does one piece of its work, over and over, in one process.

Machines are noisy, and their noise is slower than a round: what two contenders took in the same round can be
compared, what they took on different days cannot. A trainer runs its own loop and cannot be called step by step, so
each contender has a thread, of which only one ever runs.
"""

import ctypes
import gc
import io
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

# Of glibc's malloc.h: M_ARENA_MAX, M_MMAP_THRESHOLD (the largest that it takes), M_TRIM_THRESHOLD.
MALLOC = {-8: 1, -3: 32 * 2**20, -1: 2**31 - 1}

START_METHOD = "spawn"  # of processes: nothing is in their memory that the job did not put there

# Sets itself up and works without end, or as long as it can, calling what it is given after every piece of work.
Work = Callable[[Callable[[], None]], None]


class ContenderFailed(Exception):
    """A contender raised something, or came to its end too early."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def rounds(contenders: Mapping[str, Work], *, cpu: bool = False) -> Generator[dict[str, float], None, None]:
    """Warm up, then round after round, without end, the seconds that each contender took for a piece of work. The
    order is drawn anew for each, so that nobody always follows the same other. Leaving the iterator ends the work.

    Args:
        cpu: count the processor seconds of this process instead.
    Raises:
        ContenderFailed: at its first piece of work or a later one.
    """
    _share_memory()
    with ExitStack() as stack:
        stack.callback(gc.collect)  # trainers hold themselves in cycles; on a GPU the next ones would want for memory
        turns = {name: _Turns(name, work, cpu) for name, work in contenders.items()}
        for one in turns.values():
            stack.callback(one.end)
        for one in turns.values():
            one.take()  # the first piece of work comes with loading and compiling
        names, draw = list(turns), random.Random(0)
        while True:
            draw.shuffle(names)
            taken = {name: turns[name].take() for name in names}
            yield {name: taken[name] for name in turns}


def apart(name: str, job: Callable[..., float], *args: Any) -> float:
    """What the job of a contender gives in a process of its own.

    Raises:
        ContenderFailed: it failed, or its process was killed.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, job, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        result = f"its process ended with code {process.exitcode}, perhaps for want of memory"
    process.join()
    if isinstance(result, str):
        raise ContenderFailed(name, result)
    return float(result)


def _send(sender: Any, job: Callable[..., float], args: Sequence[Any]) -> None:
    try:
        sender.send(job(*args))
    except ContenderFailed as error:
        sender.send(error.reason)
    except Exception as error:  # a peer may raise anything
        sender.send(_one_line(error))
    os._exit(0)  # with the interpreter still there: what MLX keeps for a thread that has ended needs it to let go


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def repeated(job: Callable[[], None], times: int = 1) -> Work:
    """A contender whose piece of work is a job, so many times."""

    def work(pause: Callable[[], None]) -> None:
        while True:
            for _ in range(times):
                job()
            pause()

    return work


def _share_memory() -> None:
    """Have every contender take what the one before it freed, where glibc would keep it for one thread (eight trainers
    would hold eight steps' memory) or give it back to the system, for the next to wait for it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for option, value in MALLOC.items():
            libc.mallopt(option, value)


class _Ended(BaseException):
    """Unwinds a contender that nobody waits for any more; no `except Exception` on the way stops it."""


class _Turns:
    """One contender and its thread."""

    def __init__(self, name: str, work: Work, cpu: bool):
        self.name, self._cpu = name, cpu
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._work, self._reason, self._ended = work, "", False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def take(self) -> float:
        """One piece of work; what it prints is dropped."""
        if not self._thread.is_alive() and not self._ended:
            self._thread.start()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            clock = time.process_time if self._cpu else time.perf_counter
            started = clock()
            self._go.release()
            self._back.acquire()
            seconds = clock() - started
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
            self._reason = _one_line(error)
        self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._ended:
            raise _Ended
