"""Simple Preference Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, pairs_of


@dataclass(frozen=True)
class SimPO(Objective):
    """DPO with the mean log-likelihood in the place of the reward, and a margin."""

    beta: float = 2.0
    """Scale of the mean log-likelihood."""
    gamma: float = 0.5
    """Margin to reach; the authors tune it as a share of beta, a quarter of it here."""

    name = "simpo"
    source = "arXiv 2405.14734, equation 6"
    wants = "puts the chosen row's mean likelihood above the rejected one's by a margin"
    formula = "−log σ(β (mean log p of chosen − mean log p of rejected) − γ)"
    unit = "pair"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=False)
        return -log_sigmoid(ops, self.beta * (chosen.mean_log_p - rejected.mean_log_p) - self.gamma)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.mean_log_p
