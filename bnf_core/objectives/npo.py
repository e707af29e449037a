"""Negative Preference Optimization: unlearning."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, rows_of


@dataclass(frozen=True)
class NPO(Objective):
    """DPO's rejected half; chosen rows are passed over."""

    beta: float = 0.1
    """How far the policy may leave the reference: towards 0 this becomes gradient ascent."""

    name = "npo"
    source = "arXiv 2404.05868, equation 3"
    wants = "lowers rejected rows, and lets go once they are below the reference"
    formula = "−2/β log σ(−β log p/r) of a rejected row"
    normaliser = "rejected"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        rows = rows_of(ops, seen, reference=True)
        return -2 / self.beta * log_sigmoid(ops, -self.beta * rows.log_ratio)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
