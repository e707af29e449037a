"""The processes that share a run, and the one thing they do together: telling each other arrays."""

from collections.abc import Sequence

import numpy as np

from bnf_core.errors import TrainingStopped, UserError
from bnf_core.types import Array


class Processes:
    """A run on one process. A backend that can use several derives from this and gives `rank`, `count` and
    `gather_bytes`; every method that gathers must be called by all processes, in the same order."""

    rank: int = 0
    count: int = 1
    together: int = 1  # neighbours that compute every micro-batch between them, and so have the same ones

    @property
    def shares(self) -> int:
        """Among how many the micro-batches of a step are dealt."""
        return self.count // self.together

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What every process gave, in order of rank."""
        return [data]

    def gather(self, values: Array) -> list[Array]:
        """The 1-D arrays of every process, in order of rank; lengths may differ, the dtype may not. Of processes that
        compute together, which have the same, the first one's."""
        every = self.gather_bytes(np.ascontiguousarray(values).tobytes())
        return [np.frombuffer(data, values.dtype) for data in every[:: self.together]]

    def sum(self, values: Array) -> Array:
        """Element by element, in order of rank: the same bits everywhere."""
        total: Array = np.sum(self.gather(values), axis=0)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        return any(other != b"\0" for other in self.gather_bytes(b"\1" if flag else b"\0"))

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather_bytes(b"")

    def require_same(self, what: str, value: str) -> None:
        """Raises UserError, on every process, where the processes differ in a value."""
        values = [data.decode() for data in self.gather_bytes(value.encode())]
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(
                    f"the processes of this run see different {what}: process 0 has {values[0]}, process {rank} has "
                    f"{other}. Give every machine the same files and settings"
                )

    def share(self, items: Sequence[object]) -> slice:
        """Which of the items, dealt one by one, are this process's."""
        return slice(self.rank // self.together, len(items), self.shares)


ALONE = Processes()


def lost(reason: str) -> TrainingStopped:
    """What to raise where another process is gone.

    Args:
        reason: what the library that sends says of it.
    """
    return TrainingStopped(
        "another process of this run has ended, or cannot be reached; its own message says why. Checkpoints that were "
        f"written stay, and the run can resume from them with --resume. ({' '.join(reason.split())[:200]})"
    )
