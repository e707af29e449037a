"""The reference's log-odds of a run, one float32 per completion token: looked up, or computed once per row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from bnf_core.errors import UserError
from bnf_core.processes import Processes
from bnf_core.storage.reference_folder import StoredReference
from bnf_core.types import Array, Batch


class Reference(Protocol):
    """Where the reference log-odds of a run come from."""

    generation: int
    """How often it was made to forget: as long as this stays, the arrays of `state` only grow."""

    def __call__(self, batch: Batch) -> Array:
        """(N,) float32, in the order of the batch's tokens."""
        ...

    def fill(self, batches: Sequence[Batch], processes: Processes) -> None:
        """Know the rows of these batches, which all processes ask for together."""
        ...

    def passing(self) -> "Reference":
        """One that looks here first, and keeps what it computes to itself: for rows that are met once."""
        ...

    def state(self) -> dict[str, Array]: ...
    def load_state(self, state: Mapping[str, Array]) -> None: ...
    def forget(self) -> None: ...


class NoReference:
    """For objectives that need none: nothing is computed, and every log-odds is 0."""

    generation = 0

    def __call__(self, batch: Batch) -> Array:
        return np.zeros(len(batch.targets), np.float32)

    def fill(self, batches: Sequence[Batch], processes: Processes) -> None:
        return

    def passing(self) -> "NoReference":
        return self

    def state(self) -> dict[str, Array]:
        return {}

    def load_state(self, state: Mapping[str, Array]) -> None:
        return

    def forget(self) -> None:
        return


class ReferenceCache:
    """Looks up a batch's reference log-odds: those it has met, then those stored, and computes the others.

    Args:
        compute: (N,) reference log-odds of a batch, such as `Engine.reference_log_odds`; None: all must be stored.
        stored: what was computed beforehand.
    """

    def __init__(
        self, compute: Callable[[Batch], Array] | None, stored: "StoredReference | ReferenceCache | None" = None
    ):
        self._compute = compute
        self._stored = stored
        self._computed: dict[int, Array] = {}
        self.generation = 0

    def __call__(self, batch: Batch) -> Array:
        """(N,) float32, in the order of the batch's tokens.

        Raises:
            UserError: a row is not stored, and there is nothing to compute it with.
        """
        if self.missing(batch):
            self._learn(batch)
        return np.concatenate([np.zeros(0, np.float32), *map(self.__getitem__, batch.keys.tolist())])

    def __contains__(self, key: int) -> bool:
        return key in self._computed or (self._stored is not None and key in self._stored)

    def __getitem__(self, key: int) -> Array:
        if key in self._computed or self._stored is None:
            return self._computed[key]
        return self._stored[key]

    def passing(self) -> "ReferenceCache":
        return ReferenceCache(self._compute, self)

    def missing(self, batch: Batch) -> bool:
        """Whether any row of the batch has to be computed."""
        return any(key not in self for key in batch.keys.tolist())

    def fill(self, batches: Sequence[Batch], processes: Processes) -> None:
        """Know the rows of these batches and of those that the other processes give, as many each. Where one has to
        compute, all do, together; then each learns what the others computed."""
        computed = [key for batch in batches if processes.any(self.missing(batch)) for key in self._learn(batch)]
        if not processes.any(bool(computed)):
            return
        mine = self.state(computed)
        shares = [processes.gather(mine[name]) for name in mine]
        for share in zip(*shares, strict=True):
            self.merge(dict(zip(mine, share, strict=True)))

    def state(self, keys: Iterable[int] | None = None) -> dict[str, Array]:
        """What was computed here, or these rows of it: keys (R,) uint64, how many tokens each row has (R,) int32,
        and all their log-odds, flat, float32."""
        chosen = list(self._computed if keys is None else keys)
        values = [self._computed[key] for key in chosen]
        return {
            "keys": np.asarray(chosen, np.uint64),
            "lengths": np.asarray([len(value) for value in values], np.int32),
            "log_odds": np.concatenate([np.zeros(0, np.float32), *values]),
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Know what another cache knew. Computing it again would not do where bits matter: a row's log-odds
        depend, in the last one, on the rows it shares a batch with, and those differ from epoch to epoch."""
        self._computed = {}
        if state:  # a checkpoint keeps no arrays of a cache that knew nothing
            self.merge(state)

    def forget(self) -> None:
        """Know nothing but what is stored: for rows that are not met again."""
        self._computed = {}
        self.generation += 1

    def merge(self, state: Mapping[str, Array]) -> None:
        """Learn what another process computed; what is known already stays."""
        ends = np.cumsum(state["lengths"], dtype=np.int64)
        for key, length, end in zip(state["keys"].tolist(), state["lengths"].tolist(), ends.tolist(), strict=True):
            self._computed.setdefault(key, state["log_odds"][end - length : end].copy())

    def _learn(self, batch: Batch) -> list[int]:
        """Compute a batch, and keep those of its rows that were not known: their keys."""
        if self._compute is None:
            folder = getattr(self._stored, "folder", "the reference cache")
            raise UserError(
                f"{folder} lacks rows of this data: run "
                "`bnf reference` with the same data and --output, which adds them"
            )
        values = self._compute(batch).astype(np.float32)
        learned = []
        for row, key in enumerate(batch.keys.tolist()):
            if key not in self:
                self._computed[key] = values[batch.sequence_ids == row]
                learned.append(key)
        return learned


def with_reference(batches: Sequence[Batch], reference: Reference, processes: Processes) -> list[tuple[Batch, Array]]:
    """Micro-batches with their ref_log_odds. Where any process has to compute some, all run the model together,
    and tell each other what they found."""
    if processes.count > 1:
        reference.fill(batches, processes)
    return [(batch, reference(batch)) for batch in batches]
