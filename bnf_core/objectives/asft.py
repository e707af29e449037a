"""Aligned Supervised Fine-Tuning through absolute likelihood."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, rows_of
from bnf_core.objectives.orpo import mean_log_odds


@dataclass(frozen=True)
class ASFT(Objective):
    """ORPO without a comparison: each row's odds by themselves, so that rows need no partner. Chosen and rejected rows
    are each divided by their own number."""

    beta: float = 0.1
    """Weight of the odds beside fine-tuning on chosen rows. No default is published: this is ORPO's."""

    name = "asft"
    source = "arXiv 2409.10571"
    wants = "raises chosen rows, and the odds of chosen above and of rejected below even"
    formula = "−mean log p of a chosen row − β log σ(± log odds of a row)"
    normaliser = "labels"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.beta >= 0, "beta", "a number of at least 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        rows = rows_of(ops, seen, reference=False)
        likelihood = ops.where(rows.labels > 0, rows.mean_log_p, 0.0)
        return -likelihood - self.beta * log_sigmoid(ops, rows.labels * mean_log_odds(ops, rows))

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.mean_log_p
