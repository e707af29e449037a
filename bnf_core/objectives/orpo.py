"""Odds Ratio Preference Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log1mexp, log_sigmoid, pairs_of


@dataclass(frozen=True)
class ORPO(Objective):
    """Fine-tuning on the chosen row, and a logistic loss of the odds of both, where p is a row's mean probability (the
    geometric mean over its tokens)."""

    beta: float = 0.1
    """λ of the paper: weight of the odds ratio."""

    name = "orpo"
    source = "arXiv 2403.07691, equations 6 and 7"
    wants = "raises the chosen row, and its odds above those of the rejected one"
    formula = "−mean log p of chosen − β log σ(log odds of chosen − log odds of rejected)"
    unit = "pair"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.beta >= 0, "beta", "a number of at least 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=False)
        difference = mean_log_odds(ops, chosen) - mean_log_odds(ops, rejected)
        return -chosen.mean_log_p - self.beta * log_sigmoid(ops, difference)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.mean_log_p


def mean_log_odds(ops: Ops, rows: Rows) -> Any:
    """log p̄ / (1 − p̄), p̄ the geometric mean of a row's token probabilities."""
    return rows.mean_log_p - log1mexp(ops, rows.mean_log_p)
