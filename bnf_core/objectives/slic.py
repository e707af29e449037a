"""Sequence Likelihood Calibration with human feedback (SLiC-HF)."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Seen, Units, pairs_of


@dataclass(frozen=True)
class SLiC(Objective):
    """A hinge on the log-likelihoods themselves. The paper's regulariser takes any text as its target; here it is the
    chosen row."""

    delta: float = 1.0
    """Margin of log-likelihood to reach, in nats."""
    nll_weight: float = 0.5
    """λ: weight of the chosen row's negative log-likelihood. Implementations differ: HALOs takes 0.1."""

    name = "slic"
    source = "arXiv 2305.10425"
    wants = "puts the chosen row's likelihood above the rejected one's by a margin, and no more, and raises it"
    formula = "max(0, δ − log p of chosen + log p of rejected) − λ log p of chosen"
    unit = "pair"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.delta > 0, "delta", "a number above 0")
        self._require(self.nll_weight >= 0, "nll_weight", "a number of at least 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=False)
        return ops.maximum(self.delta - chosen.log_p + rejected.log_p, 0.0) - self.nll_weight * chosen.log_p
