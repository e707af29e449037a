"""The reference's log-odds, computed once per row: one float32 per completion token."""

from collections.abc import Callable, Mapping

import numpy as np

from bnf_core.batching import Array, Batch


class ReferenceCache:
    """Looks up a batch's reference log-odds, computing those of rows it has not met.

    Args:
        compute: (N,) reference log-odds of a batch, such as `Engine.reference_log_odds`.
    """

    def __init__(self, compute: Callable[[Batch], Array]):
        self._compute = compute
        self._by_row: dict[int, Array] = {}

    def __call__(self, batch: Batch) -> Array:
        """(N,) float32, in the order of the batch's tokens."""
        row_ids = [int(i) for i in batch.row_ids]
        if any(i not in self._by_row for i in row_ids):
            values = self._compute(batch)
            for row, i in enumerate(row_ids):
                self._by_row[i] = values[batch.rows == row].astype(np.float32)
        return np.concatenate([self._by_row[i] for i in row_ids])

    def state(self) -> dict[str, Array]:
        """What is known, as arrays: rows (R,), how many tokens each has (R,), and all their log-odds, flat."""
        values = list(self._by_row.values())
        return {
            "rows": np.asarray(list(self._by_row), np.int64),
            "lengths": np.asarray([len(v) for v in values], np.int64),
            "log_odds": np.concatenate(values) if values else np.zeros(0, np.float32),
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Know what another cache knew. Computing it again would not do where bits matter: a row's log-odds
        depend, in the last one, on the rows it shares a batch with, and those differ from epoch to epoch."""
        values = np.split(state["log_odds"], np.cumsum(state["lengths"])[:-1])
        self._by_row = {int(row): value for row, value in zip(state["rows"], values, strict=False)}
