"""Distributional Dispreference Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, rows_of, some


@dataclass(frozen=True)
class D2O(Objective):
    """DPO of a rejected row against the mean reward of all chosen rows of its prompt. The paper samples those from the
    model itself; here they are what the data hold, and both of its references are the one reference."""

    beta: float = 0.1
    """Scale of the chosen rows' mean reward. For it and alpha no published default was found: these are DPO's."""
    alpha: float = 0.1
    """Scale of the rejected row's reward."""

    name = "d2o"
    source = "arXiv 2403.03419"
    wants = "lowers a rejected row below what the prompt's other completions are on the whole"
    formula = "−log σ(β mean over chosen of log p/r − α log p/r of rejected)"
    unit = "prompt"
    takes_weights = False  # a rejected row is compared with the plain mean of the chosen ones

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        self._require(self.alpha > 0, "alpha", "a number above 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        rows = rows_of(ops, seen, reference=True)
        count = ops.row_sum(rows.labels * rows.labels, units.chosen)
        chosen = ops.row_sum(rows.log_ratio, units.chosen) / count
        return -log_sigmoid(ops, self.beta * chosen - self.alpha * some(ops, rows, units.rejected).log_ratio)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
