"""Direct Preference Optimization, with label smoothing (cDPO) and its unbiased form (robust DPO)."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, pairs_of


@dataclass(frozen=True)
class DPO(Objective):
    """The logistic loss of the difference of implicit rewards β log(p / r)."""

    beta: float = 0.1
    """How far the policy may leave the reference: less is farther."""
    label_smoothing: float = 0.0
    """Share of pairs that are thought to be labelled the wrong way round (cDPO), below 0.5."""
    robust: bool = False
    """Correct for that share without bias (robust DPO, arXiv 2403.00409) instead of smoothing."""

    name = "dpo"
    source = "arXiv 2305.18290, equation 7; label smoothing: ericmitchell.ai/cdpo.pdf"
    wants = "puts the chosen row above the rejected one, by any margin and at any likelihood"
    formula = "−log σ(β (log p/r of chosen − log p/r of rejected))"
    unit = "pair"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "a share from 0 up to 0.5")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=True)
        margin = self.beta * (chosen.log_ratio - rejected.log_ratio)
        return smoothed(ops, margin, self.label_smoothing, robust=self.robust)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio


def smoothed(ops: Ops, margin: Any, label_smoothing: float, *, robust: bool = False) -> Any:
    """−log σ(margin), where a share of the labels is wrong."""
    if not label_smoothing:
        return -log_sigmoid(ops, margin)
    right, wrong = -log_sigmoid(ops, margin), -log_sigmoid(ops, -margin)
    if robust:
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong
