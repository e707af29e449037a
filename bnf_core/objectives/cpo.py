"""Contrastive Preference Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, pairs_of
from bnf_core.objectives.dpo import smoothed


@dataclass(frozen=True)
class CPO(Objective):
    """DPO without its reference, and fine-tuning on the chosen row, here a mean over its tokens: the authors'
    code averages over the tokens of the whole batch."""

    beta: float = 0.1
    """Scale of the log-likelihoods."""
    nll_weight: float = 1.0
    """Weight of the chosen row's negative log-likelihood."""
    label_smoothing: float = 0.0
    """Share of pairs that are thought to be labelled the wrong way round, below 0.5."""

    name = "cpo"
    source = "arXiv 2401.08417; the authors' ALMA"
    wants = "puts the chosen row's likelihood above the rejected one's, and raises it"
    formula = "−log σ(β (log p of chosen − log p of rejected)) − λ mean log p of chosen"
    unit = "pair"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        self._require(self.nll_weight >= 0, "nll_weight", "a number of at least 0")
        self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "a share from 0 up to 0.5")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=False)
        contrast = smoothed(ops, self.beta * (chosen.log_p - rejected.log_p), self.label_smoothing)
        return contrast - self.nll_weight * chosen.mean_log_p

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_p
