"""The processes that `mlx.launch` started, over whichever of ring, MPI, JACCL and NCCL it set up."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx
import numpy as np

from bnf_core.processes import ALONE, Processes, lost
from bnf_core.types import Array

BUCKET_BYTES = 32 * 2**20  # of gradients sent at a time; mlx.nn.average_gradients has the same


class MLXProcesses(Processes):
    """Those of an MLX group.

    When a process dies, the ring backend fails the next call, but the one under way returns whatever is in memory.
    So everything that is gathered carries its number in order, which must arrive.
    """

    def __init__(self, group: mx.distributed.Group):
        self.group = group
        self.rank, self.count = group.rank(), group.size()
        self._number = 0

    def gather_bytes(self, data: bytes) -> list[bytes]:
        # MLX gathers arrays of one shape only: the lengths first, then everything padded to the longest.
        self._number += 1
        lengths = self._gather(np.array([len(data)], np.int64))[:, 0].tolist()
        longest = max(lengths)
        if longest == 0:
            return [b""] * self.count
        rows = self._gather(np.frombuffer(data.ljust(longest, b"\0"), np.uint8))
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    def _gather(self, values: Array) -> Array:
        """1-D arrays of one length, a row for each process."""
        number = np.array([self._number]).view(values.dtype)
        with lost_processes():
            gathered = mx.distributed.all_gather(mx.array(np.concatenate([values, number])), group=self.group)
            rows = np.array(gathered).reshape(self.count, -1)
            if not (rows[:, len(values) :] == number).all():
                raise RuntimeError("what was sent did not arrive")
        return rows[:, : len(values)]


def processes() -> Processes:
    """Those of this run, alone where nothing launched more."""
    group = mx.distributed.init()
    if group.size() == 1:
        return ALONE
    end_with_parent()
    return MLXProcesses(group)


@cache
def end_with_parent(every: float = 0.2) -> None:
    """Have this process told to end (SIGTERM) once its parent is gone. mlx.launch passes on no signal: told to end, it
    goes alone, and its processes would train on where nobody sees them.

    Args:
        every: seconds between two looks.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # the launcher was reading them: to print a word would now be an error
            os.dup2(nowhere, descriptor)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def sum_over(members: Processes, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Float32 arrays by name, which all processes have alike, each replaced by its sum over the processes.

    Small ones travel together. Every process gets the same bits.
    """
    if not isinstance(members, MLXProcesses):
        return arrays
    result: dict[str, mx.array] = {}
    for names in _buckets(arrays):
        flat = mx.concatenate([arrays[name].flatten() for name in names])
        with lost_processes():
            flat = mx.distributed.all_sum(flat, group=members.group)
            mx.eval(flat)  # in this order on every process
        ends = np.cumsum([arrays[name].size for name in names])
        parts = mx.split(flat, ends[:-1].tolist())
        result |= {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}
    members.barrier()  # whoever gets this far had all the others there
    return result


def in_order(members: Processes, arrays: dict[str, mx.array]) -> Iterator[dict[str, mx.array]]:
    """What each process has under these names, float32, in order of rank: of micro-batches, their order in the step,
    for the k-th of rank r is its (k · count + r)-th, as `Processes.share` deals them."""
    if not isinstance(members, MLXProcesses):
        yield arrays
        return
    flat = mx.concatenate([array.flatten() for array in arrays.values()])
    with lost_processes():
        every = mx.distributed.all_gather(flat[None], group=members.group)  # (processes, numbers)
        mx.eval(every)
    members.barrier()  # whoever gets this far had all the others there
    ends = np.cumsum([array.size for array in arrays.values()])[:-1].tolist()
    for rank in range(members.count):
        parts = mx.split(every[rank], ends)
        yield {name: part.reshape(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}


@contextmanager
def lost_processes() -> Iterator[None]:
    """Raises TrainingStopped where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise lost(str(error)) from error


def _buckets(arrays: dict[str, mx.array]) -> list[list[str]]:
    """Names in their order, cut after at least BUCKET_BYTES each."""
    buckets: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += array.nbytes
    return buckets
