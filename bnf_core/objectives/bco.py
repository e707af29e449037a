"""Binary Classifier Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, rows_of


@dataclass(frozen=True)
class BCO(Objective):
    """A classifier whose logit is the reward less δ, the middle between the mean rewards of chosen and of rejected
    rows: a number without gradient, averaged over all steps so far and this one. Chosen and rejected rows are each
    divided by their own number, as the paper's two expectations are."""

    beta: float = 0.1
    """How far the policy may leave the reference: less is farther."""

    name = "bco"
    source = "arXiv 2404.04656"
    wants = "tells chosen from rejected rows by their rewards, whatever is usual"
    formula = "−log σ(±(β log p/r − δ))"
    normaliser = "labels"
    baseline_from = "running"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        rows = rows_of(ops, seen, reference=True)
        return -log_sigmoid(ops, rows.labels * self.beta * (rows.log_ratio - seen.structure.baseline))

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
