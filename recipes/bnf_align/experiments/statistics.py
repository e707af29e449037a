"""Intervals and other numbers of results."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnf_core.types import Array

DRAWS, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it with 95% confidence."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Array, seed: int = 0) -> Interval:
    """By a bootstrap over both seeds and items (Efron, 1979; percentiles).

    Args:
        values: (seeds, items) of one method, or the differences of two on the same seeds and items: then it is paired.
    """
    seeds, items = values.shape
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds  # (draws, seeds)
    of_items = rng.multinomial(items, np.full(items, 1 / items), DRAWS) / items
    means = ((of_seeds @ values) * of_items).sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def gini(values: Array | Sequence[float]) -> float:
    """How unevenly a sum is spread over values of at least 0: 0 evenly, 1 all in one."""
    ordered = np.sort(np.asarray(values, np.float64))
    count, whole = len(ordered), ordered.sum()
    if count == 0 or whole == 0:
        return 0.0
    return float(2 * (np.arange(1, count + 1) @ ordered) / (count * whole) - (count + 1) / count)
