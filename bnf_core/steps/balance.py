"""Chosen and rejected rows that count alike, whichever there are more of: an option of this project, not of the paper.

Where nine of ten rows are rejected, tokens that all completions share, such as those of a layout, are pushed down nine
times for once up. Weights that make both labels come to half of the whole let what is shared cancel, so that what
remains is what tells chosen from rejected.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bnf_core.data.table import column
from bnf_core.types import Array, Example

Factors = dict[bool, float]  # by label
ALIKE: Factors = {True: 1.0, False: 1.0}


def label_factors(rows: Sequence[Example], often: Array | None = None) -> Factors:
    """What to multiply weights by, so that those of the chosen rows sum to those of the rejected ones, and both to what
    they were; 1 where a label is missing.

    Args:
        often: (rows,) how often each is met; default: once.
    """
    weights = column(rows, "weight") * (1.0 if often is None else often)
    chosen = column(rows, "label") > 0
    sums = {label: float(weights[chosen == label].sum()) for label in (True, False)}
    half = sum(sums.values()) / 2
    return {label: half / own for label, own in sums.items()} if all(sums.values()) else ALIKE


def weighed(row: Example, factors: Factors) -> Example:
    return replace(row, weight=row.weight * factors[row.label])


def balanced(rows: Sequence[Example]) -> list[Example]:
    """These rows, of both labels the same weight in all."""
    factors = label_factors(rows)
    return [weighed(row, factors) for row in rows]


def repeats(sizes: Sequence[int], takes: Sequence[int]) -> Array:
    """(rows,) how often an epoch has each row of sources that follow each other, by their sizes and what it takes."""
    return np.repeat(np.asarray(takes, np.float64) / np.maximum(sizes, 1), sizes)
