"""Kahneman-Tversky Optimization."""

from dataclasses import dataclass
from typing import Any, ClassVar

from bnf_core.objectives.base import BaselineFrom, Objective, Ops, Rows, Seen, Units, rows_of, sigmoid


@dataclass(frozen=True)
class KTO(Objective):
    """Rewards are judged against z₀, the mean reward of prompts with completions of other prompts of the same step, at
    least 0: a number without gradient."""

    beta: float = 0.1
    """How far the policy may leave the reference: less is farther."""
    desirable_weight: float = 1.0
    """Of chosen rows. The paper asks for weights that make both kinds count about alike where one is rare."""
    undesirable_weight: float = 1.0
    """Of rejected rows."""

    name = "kto"
    source = "arXiv 2402.01306"
    wants = "raises chosen and lowers rejected rows where their reward is near what is usual, and lets go elsewhere"
    formula = "λ (1 − σ(±β (log p/r − z₀)))"
    baseline_from: ClassVar[BaselineFrom] = "mismatched"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        for name in ("desirable_weight", "undesirable_weight"):
            self._require(getattr(self, name) >= 0, name, "a number of at least 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        return self._against(ops, rows_of(ops, seen, reference=True), seen.structure.baseline)

    def _against(self, ops: Ops, rows: Rows, anchor: Any) -> Any:
        """The loss (S,) of rows whose rewards are judged against an anchor."""
        weight = ops.where(rows.labels > 0, self.desirable_weight, self.undesirable_weight)
        # 1 − σ(x) = σ(−x)
        return weight * sigmoid(ops, -rows.labels * self.beta * (rows.log_ratio - anchor))

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
