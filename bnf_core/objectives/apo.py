"""Anchored Preference Optimization, the unpaired form of its variant "zero"."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, rows_of, sigmoid


@dataclass(frozen=True)
class APOZeroUnpaired(Objective):
    """KTO anchored at the reference itself: for chosen rows that are better than what the model says."""

    beta: float = 0.1
    """How far the policy may leave the reference: less is farther."""
    desirable_weight: float = 1.0
    """Of chosen rows."""
    undesirable_weight: float = 1.0
    """Of rejected rows."""

    name = "apo_zero_unpaired"
    source = "arXiv 2408.06266, equation 7, each row by itself"
    wants = "raises chosen rows above the reference and lowers rejected rows below it"
    formula = "λ (1 − σ(±β log p/r))"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        for name in ("desirable_weight", "undesirable_weight"):
            self._require(getattr(self, name) >= 0, name, "a number of at least 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        rows = rows_of(ops, seen, reference=True)
        weight = ops.where(rows.labels > 0, self.desirable_weight, self.undesirable_weight)
        return weight * sigmoid(ops, -rows.labels * self.beta * rows.log_ratio)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
