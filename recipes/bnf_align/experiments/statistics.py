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


def interval(values: Array, seed: int = 0, groups: Array | None = None) -> Interval:
    """By a bootstrap over both seeds and items (Efron, 1979; percentiles).

    Args:
        values: (seeds, items) of one method, or the differences of two on the same seeds and items: then it is paired.
        groups: (items,) from 0: items of one group, such as questions with one answer, are drawn together.
    """
    seeds, items = values.shape
    groups = np.arange(items) if groups is None else groups
    sizes = np.bincount(groups)
    sums = np.array([np.bincount(groups, row, len(sizes)) for row in values])  # (seeds, groups)
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds  # (draws, seeds)
    of_groups = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), DRAWS)  # (draws, groups)
    means = ((of_seeds @ sums) * of_groups).sum(axis=1) / (of_groups @ sizes)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def separation(above: Array, below: Array) -> Array:
    """How well numbers that should be larger can be told from others: the mean is the area under the ROC curve, and the
    values are those whose spread is that of the area (DeLong and others, 1988). Items of one place belong together."""
    larger = (above[:, None] > below) + 0.5 * (above[:, None] == below)  # (items, items)
    found: Array = larger.mean(axis=1) + larger.mean(axis=0) - larger.mean()
    return found


def gini(values: Array | Sequence[float]) -> float:
    """How unevenly a sum is spread over values of at least 0: 0 evenly, 1 all in one."""
    ordered = np.sort(np.asarray(values, np.float64))
    count, whole = len(ordered), ordered.sum()
    if count == 0 or whole == 0:
        return 0.0
    return float(2 * (np.arange(1, count + 1) @ ordered) / (count * whole) - (count + 1) / count)
